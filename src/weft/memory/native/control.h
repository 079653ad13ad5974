// What the CPU and the CUDA allocator share: the books, the thread's arena, and the C functions that Python calls.
//
// The including file defines `backing` (how to get and give back address space) first. One mutex guards everything; it is held
// around fork, so that a child never inherits it locked. Nothing here is ever destroyed: tensors may die after `main`.
// Functions return a count, a number >= 0, or a negative code; they never throw. Only `admit`, which torch calls, throws.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>

#include <c10/util/Exception.h>

#include "arena.h"
#include "ledger.h"

#define WEFT_API extern "C" __attribute__((visibility("default")))

namespace weft {

struct State {
  std::mutex mutex;
  Ledger ledger;
};

inline State& state() {
  static State& only = *[] {
    auto* made = new State();
    static State* held = made;
    pthread_atfork([] { held->mutex.lock(); }, [] { held->mutex.unlock(); }, [] { held->mutex.unlock(); });
    return made;
  }();
  return only;
}

using Lock = std::lock_guard<std::mutex>;

struct Thread {
  Arena* serving = nullptr;                        // gives the bytes of this thread's allocations
  int64_t started = 0;                             // clock of `expect`
  int depth = 0;                                   // of operators within operators
  int64_t most = -1;                               // bytes since the mark that this thread may bring about; -1 for any
  std::vector<std::pair<void*, int64_t>> inside;  // allocations of the running operator: address, clock
};

inline thread_local Thread thread;

[[noreturn]] inline void refuse(const std::string& why) {
  C10_THROW_ERROR(OutOfMemoryError, "weft.memory: " + why);
}

inline std::string bytes(int64_t nbytes) { return std::to_string(nbytes) + " bytes"; }

inline void enter(void* address, Block block) {
  Ledger& ledger = state().ledger;
  if (thread.depth > 0) block.category = kWorkspace;
  ledger.born(address, block);
  if (thread.depth > 0) thread.inside.emplace_back(address, ledger.clock);
}

// Let n more bytes in, or throw: their address in this thread's arena, or null if they are to come from outside. Locked.
inline void* admit(int64_t nbytes) {
  Ledger& ledger = state().ledger;
  if (thread.most >= 0 && ledger.live + nbytes - ledger.mark_live > thread.most) {
    ledger.mark_peak = std::max(ledger.mark_peak, ledger.live + nbytes);  // what was asked for, had it been given
    refuse("an allocation of " + bytes(nbytes) + " would exceed the " + bytes(thread.most) + " of this operator");
  }
  int w = ledger.refusing(nbytes);
  if (w >= 0) {
    const Window& window = ledger.windows[w];
    refuse("an allocation of " + bytes(nbytes) + " would exceed the cap of " + bytes(window.cap) + "; " +
           bytes(window.live.total) + " are alive");
  }
  Arena* arena = thread.serving;
  if (arena == nullptr) return nullptr;
  int64_t at = arena->serve(nbytes);
  if (at >= 0) {
    Block block;
    block.nbytes = nbytes;
    block.arena = arena;
    enter(arena->base + at, block);
    return arena->base + at;
  }
  if (arena->stray != kStrayOutside)
    refuse("no room in the arena for " + bytes(nbytes) +
           (arena->stray == kStrayError ? ", which nobody expected" : "") + ": " + bytes(arena->size - arena->used) + " of " +
           bytes(arena->size) + " are free, the largest hole has " + bytes(arena->largest_hole()));
  return nullptr;
}

inline void end_arena(Arena* arena) {
  backing.unreserve(arena->base, arena->size);
  delete arena;
}

// Give an arena's bytes back. Locked.
inline void release(Arena* arena, void* address) {
  arena->release(static_cast<char*>(address) - arena->base);
  if (arena->closed && arena->empty()) end_arena(arena);
}

inline void operator_begin() { ++thread.depth; }

// The outermost operator has ended: what it made and still lives are activations, the rest was workspace.
inline void operator_end() {
  if (thread.depth == 0 || --thread.depth > 0 || thread.inside.empty()) return;
  State& s = state();
  {
    Lock lock(s.mutex);
    for (auto& made : thread.inside) {
      auto found = s.ledger.blocks.find(made.first);
      if (found != s.ledger.blocks.end() && found->second.born == made.second)
        s.ledger.relabel(found->second, kActivation);
    }
  }
  thread.inside.clear();
}

}  // namespace weft

// -- the books ------------------------------------------------------------------------------------------------------------

WEFT_API int weft_version() { return 2; }

WEFT_API int64_t weft_live() {
  weft::Lock lock(weft::state().mutex);
  return weft::state().ledger.live;
}

// most: bytes from here on that this thread's allocations may bring about until `weft_since`; -1 for any.
WEFT_API void weft_mark(int64_t most) {
  weft::Lock lock(weft::state().mutex);
  weft::thread.most = most;
  auto& ledger = weft::state().ledger;
  ledger.mark_live = ledger.mark_peak = ledger.live;
}

WEFT_API int64_t weft_since(int64_t* left) {
  weft::Lock lock(weft::state().mutex);
  weft::thread.most = -1;
  auto& ledger = weft::state().ledger;
  *left = ledger.live - ledger.mark_live;
  return ledger.mark_peak - ledger.mark_live;
}

WEFT_API void weft_log_start() {
  weft::Lock lock(weft::state().mutex);
  weft::state().ledger.log.clear();
  weft::state().ledger.logging = true;
}

WEFT_API int64_t weft_log_stop() {
  weft::Lock lock(weft::state().mutex);
  weft::state().ledger.logging = false;
  return static_cast<int64_t>(weft::state().ledger.log.size());
}

WEFT_API void weft_log_read(int64_t* pairs, int64_t count) {
  weft::Lock lock(weft::state().mutex);
  auto& log = weft::state().ledger.log;
  for (int64_t i = 0; i < count && i < static_cast<int64_t>(log.size()); ++i) {
    pairs[2 * i] = reinterpret_cast<int64_t>(log[i].first);
    pairs[2 * i + 1] = log[i].second;
  }
  log = {};
}

WEFT_API int weft_window_open(int64_t cap) {
  weft::Lock lock(weft::state().mutex);
  return weft::state().ledger.open(cap);
}

WEFT_API void weft_window_close(int w) {
  weft::Lock lock(weft::state().mutex);
  if (weft::state().ledger.is_open(w)) weft::state().ledger.close(w);
}

WEFT_API void weft_window_cap(int w, int64_t cap) {
  weft::Lock lock(weft::state().mutex);
  if (weft::state().ledger.is_open(w)) weft::state().ledger.set_cap(w, cap);
}

WEFT_API void weft_window_reset(int w) {
  weft::Lock lock(weft::state().mutex);
  if (weft::state().ledger.is_open(w)) weft::state().ledger.reset_peak(w);
}

// out: live total, live by category, peak total, peak by category
WEFT_API int weft_window_read(int w, int64_t* out) {
  weft::Lock lock(weft::state().mutex);
  if (!weft::state().ledger.is_open(w)) return -1;
  auto& window = weft::state().ledger.windows[w];
  for (const auto* counts : {&window.live, &window.peak}) {
    *out++ = counts->total;
    for (int64_t by : counts->by) *out++ = by;
  }
  return 0;
}

// Count a block under a category, in window w too (w < 0: in none more). nbytes > 0: if it is not known, put it on the books as one
// whose death will not be seen. 1 if it is known, 2 if it is one of the latter, 0 if it is not on the books.
WEFT_API int weft_count(void* address, int64_t nbytes, int category, int w) {
  weft::Lock lock(weft::state().mutex);
  auto& ledger = weft::state().ledger;
  auto found = ledger.blocks.find(address);
  if (found == ledger.blocks.end()) {
    if (nbytes <= 0) return 0;
    weft::Block block;
    block.nbytes = nbytes;
    block.category = category;
    ledger.adopted(address, block);
    found = ledger.blocks.find(address);
  }
  ledger.relabel(found->second, category);
  if (ledger.is_open(w)) ledger.join(found->second, w);
  return found->second.release || found->second.arena ? 1 : 2;
}

// A block of `weft_count` has died.
WEFT_API void weft_forget(void* address) {
  weft::Lock lock(weft::state().mutex);
  auto found = weft::state().ledger.blocks.find(address);
  if (found != weft::state().ledger.blocks.end() && !found->second.release && !found->second.arena)
    weft::state().ledger.died(address);
}

WEFT_API void weft_watching(int on) {
  weft::Lock lock(weft::state().mutex);
  weft::state().ledger.watching = on != 0;
}

WEFT_API void weft_operator_begin() { weft::operator_begin(); }
WEFT_API void weft_operator_end() { weft::operator_end(); }

// -- arenas ---------------------------------------------------------------------------------------------------------------

WEFT_API void* weft_arena_open(int64_t size, int64_t align, int stray) {
  auto* arena = new weft::Arena(size, align, stray);
  arena->base = static_cast<char*>(weft::backing.reserve(size));
  if (arena->base == nullptr) {
    delete arena;
    return nullptr;
  }
  return arena;
}

WEFT_API int weft_arena_done(weft::Arena* arena) {
  weft::thread.serving = nullptr;
  weft::Lock lock(weft::state().mutex);
  auto& blocks = weft::state().ledger.blocks;
  auto& strays = arena->strays;
  size_t kept = 0;
  std::sort(strays.begin(), strays.end());  // an address may have been given out more than once
  for (size_t i = 0; i < strays.size(); ++i) {
    if (kept && strays[i].first == strays[kept - 1].first) continue;
    auto found = blocks.find(strays[i].first);
    if (found == blocks.end() || found->second.born <= weft::thread.started || found->second.nbytes != strays[i].second) continue;
    strays[kept++] = strays[i];
  }
  strays.resize(kept);
  return arena->done() + static_cast<int>(kept);
}

WEFT_API int weft_arena_expect(weft::Arena* arena, const int64_t* pairs, int64_t count, int64_t work_at, int64_t work_size) {
  weft::Lock lock(weft::state().mutex);
  weft::thread.serving = arena;
  weft::thread.started = weft::state().ledger.clock;
  return arena->expect(pairs, count, work_at, work_size);
}

// rows: for each, where it starts in `data`: number of places, workspace offset, workspace nbytes, then (nbytes, offset) pairs
WEFT_API void weft_arena_script(weft::Arena* arena, const int64_t* data, int64_t length, const int64_t* rows, int64_t count) {
  weft::Lock lock(weft::state().mutex);
  arena->script.assign(data, data + length);
  arena->script_rows.assign(rows, rows + count);
}

WEFT_API int weft_arena_play(weft::Arena* arena, int64_t row) {
  weft::Lock lock(weft::state().mutex);
  if (row < 0 || row >= static_cast<int64_t>(arena->script_rows.size())) return -1;
  weft::thread.serving = arena;
  weft::thread.started = weft::state().ledger.clock;
  return arena->play(row);
}

WEFT_API int64_t weft_arena_strays(weft::Arena* arena, int64_t* pairs, int64_t count) {
  weft::Lock lock(weft::state().mutex);
  for (int64_t i = 0; i < count && i < static_cast<int64_t>(arena->strays.size()); ++i) {
    auto& stray = arena->strays[i];
    pairs[2 * i] = arena->holds(stray.first) ? static_cast<char*>(stray.first) - arena->base : -1;
    pairs[2 * i + 1] = stray.second;
  }
  return static_cast<int64_t>(arena->strays.size());
}

// out: bytes taken (rounded), largest hole, high-water mark, number of regions, base address
WEFT_API void weft_arena_read(weft::Arena* arena, int64_t* out) {
  weft::Lock lock(weft::state().mutex);
  out[0] = arena->used;
  out[1] = arena->largest_hole();
  out[2] = arena->high;
  out[3] = static_cast<int64_t>(arena->taken().size());
  out[4] = reinterpret_cast<int64_t>(arena->base);
}

WEFT_API void weft_arena_regions(weft::Arena* arena, int64_t* pairs, int64_t count) {
  weft::Lock lock(weft::state().mutex);
  for (auto& region : arena->taken()) {
    if (count-- <= 0) break;
    *pairs++ = region.first;
    *pairs++ = region.second;
  }
}

WEFT_API void weft_arena_close(weft::Arena* arena) {
  weft::thread.serving = nullptr;
  weft::Lock lock(weft::state().mutex);
  arena->done();
  arena->closed = true;
  if (arena->empty()) weft::end_arena(arena);
}
