// Which bytes are alive, and whose they are: plain C++, no torch, no locks (the caller holds one).
//
// A block is one live allocation. A window is one meter: it counts the blocks that were born while it was open and those it
// was told to count (`join`), by category, and keeps its peak as it was at that moment. Categories are often known only later (a
// gradient is recognised when it is accumulated, workspace when its operator ends), so `relabel` also corrects the peaks at
// which the block was already there: `clock` numbers births, a block was there at a peak if it was born (and joined) before.

#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace weft {

enum Category : int { kActivation, kWorkspace, kParameter, kGradient, kOptimizer, kBuffer, kInput, kCategories };

struct Counts {
  int64_t total = 0;
  int64_t by[kCategories] = {};
  void add(int category, int64_t nbytes) {
    total += nbytes;
    by[category] += nbytes;
  }
};

struct Window {
  bool open = false;
  int64_t cap = -1;  // most bytes it may hold; -1 for any
  Counts live, peak;
  int64_t peak_at = 0;  // clock of the peak
};

struct Block {
  int64_t nbytes = 0;
  int64_t born = 0;        // clock
  int64_t joined = 0;      // clock at which it last joined a window after its birth
  uint64_t windows = 0;    // bit w: counted by window w
  uint64_t from_birth = 0;  // of those, the ones that were open when it was born
  int category = kActivation;
  void (*release)(void*) = nullptr;  // gives the bytes back; null for an arena's block or one that is only counted
  void* arena = nullptr;             // of which the bytes are, if any
};

constexpr int kWindows = 64;

class Ledger {
 public:
  Window windows[kWindows];
  std::unordered_map<void*, Block> blocks;
  int64_t live = 0;
  int64_t clock = 0;
  int64_t mark_live = 0, mark_peak = 0;
  bool logging = false;
  bool watching = false;  // operators' beginnings and ends are told
  std::vector<std::pair<void*, int64_t>> log;

  Ledger() { blocks.reserve(1 << 14); }

  // The open window whose cap n more bytes would exceed, or -1.
  int refusing(int64_t nbytes) const {
    for (uint64_t left = capped_; left; left &= left - 1) {
      int w = __builtin_ctzll(left);
      if (windows[w].live.total + nbytes > windows[w].cap) return w;
    }
    return -1;
  }

  void born(void* address, Block block) {
    died(address);  // a block that was only counted may have died unseen
    block.born = ++clock;
    block.windows = block.from_birth = open_;
    live += block.nbytes;
    if (live > mark_peak) mark_peak = live;
    for (uint64_t left = open_; left; left &= left - 1) count(windows[__builtin_ctzll(left)], block);
    if (logging) log.emplace_back(address, block.nbytes);
    blocks.emplace(address, block);
  }

  // A block that is older than the books: no event, and in no window until it joins one.
  Block& adopted(void* address, Block block) {
    block.born = ++clock;
    live += block.nbytes;
    mark_live += block.nbytes;
    mark_peak += block.nbytes;
    return blocks[address] = block;
  }

  // Takes a block off the books and returns it; nbytes -1 if there is none.
  Block died(void* address) {
    auto found = blocks.find(address);
    if (found == blocks.end()) {
      Block none;
      none.nbytes = -1;
      return none;
    }
    Block block = found->second;
    blocks.erase(found);
    live -= block.nbytes;
    for (uint64_t left = block.windows; left; left &= left - 1)
      windows[__builtin_ctzll(left)].live.add(block.category, -block.nbytes);
    if (logging) log.emplace_back(address, -block.nbytes);
    return block;
  }

  void moved(void* from, void* to) {
    auto found = blocks.find(from);
    Block block = found->second;
    blocks.erase(found);
    blocks.emplace(to, block);
  }

  void relabel(Block& block, int category) {
    if (block.category == category) return;
    for (uint64_t left = block.windows; left; left &= left - 1) {
      int w = __builtin_ctzll(left);
      Window& window = windows[w];
      move(window.live, block, category);
      int64_t since = block.from_birth >> w & 1 ? block.born : block.joined;
      if (since <= window.peak_at) move(window.peak, block, category);
    }
    block.category = category;
  }

  void join(Block& block, int w) {
    if (block.windows >> w & 1) return;
    block.windows |= uint64_t(1) << w;
    block.joined = ++clock;
    count(windows[w], block);
  }

  int open(int64_t cap) {
    for (int w = 0; w < kWindows; ++w) {
      if (windows[w].open) continue;
      windows[w] = Window();
      windows[w].open = true;
      open_ |= uint64_t(1) << w;
      set_cap(w, cap);
      return w;
    }
    return -1;
  }

  void set_cap(int w, int64_t cap) {
    windows[w].cap = cap;
    uint64_t bit = uint64_t(1) << w;
    capped_ = cap < 0 ? capped_ & ~bit : capped_ | bit;
  }

  void close(int w) {
    uint64_t bit = uint64_t(1) << w;
    windows[w].open = false;
    open_ &= ~bit;
    capped_ &= ~bit;
    for (auto& entry : blocks) {  // the number will be used again
      entry.second.windows &= ~bit;
      entry.second.from_birth &= ~bit;
    }
  }

  bool is_open(int w) const { return w >= 0 && w < kWindows && windows[w].open; }

  void reset_peak(int w) {
    windows[w].peak = windows[w].live;
    windows[w].peak_at = clock;
  }

 private:
  uint64_t open_ = 0, capped_ = 0;

  void count(Window& window, const Block& block) {
    window.live.add(block.category, block.nbytes);
    // An equal peak replaces one that may have been reached while nobody told workspace from activations.
    if (window.live.total > window.peak.total || (watching && window.live.total == window.peak.total)) {
      window.peak = window.live;
      window.peak_at = clock;
    }
  }

  static void move(Counts& counts, const Block& block, int category) {
    counts.by[block.category] -= block.nbytes;
    counts.by[category] += block.nbytes;
  }
};

}  // namespace weft
