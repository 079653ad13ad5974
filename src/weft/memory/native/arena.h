// Address space given out at offsets that the caller names: plain C++, no torch, no locks (the caller holds one).
//
// `taken` holds the regions in use in address order; they never overlap and lie inside [0, size). A `Place` is a region promised to
// the next operator: it is taken at once if it is free (so that nothing else gets it), else tried again when its allocation
// comes (a block that lay there may have died in between). Sizes are rounded up to the alignment, offsets are multiples of it.

#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

namespace weft {

enum Stray : int { kStrayArena, kStrayOutside, kStrayError };

struct Place {
  int64_t nbytes, offset;
  bool reserved, used;
};

class Arena {
 public:
  char* base = nullptr;
  int64_t size, align;
  int stray;
  int64_t used = 0, high = 0;
  bool closed = false;
  std::vector<std::pair<void*, int64_t>> strays;  // of the last operator, at no place of theirs: address, nbytes
  std::vector<int64_t> script;                    // see `play`
  std::vector<int64_t> script_rows;

  Arena(int64_t size, int64_t align, int stray) : size(size), align(align), stray(stray) {}

  bool empty() const { return taken_.empty(); }
  const std::map<int64_t, int64_t>& taken() const { return taken_; }
  bool holds(const void* p) const { return p >= base && p < base + size; }

  int64_t rounded(int64_t nbytes) const { return (nbytes + align - 1) / align * align; }

  bool is_free(int64_t offset, int64_t nbytes) const {
    if (offset < 0 || offset % align || offset + rounded(nbytes) > size) return false;
    auto next = taken_.lower_bound(offset);
    if (next != taken_.end() && next->first < offset + rounded(nbytes)) return false;
    return next == taken_.begin() || std::prev(next)->first + std::prev(next)->second <= offset;
  }

  bool take(int64_t offset, int64_t nbytes) {
    if (!is_free(offset, nbytes)) return false;
    int64_t length = rounded(nbytes);
    taken_.emplace(offset, length);
    used += length;
    if (offset + length > high) high = offset + length;
    return true;
  }

  void release(int64_t offset) {
    auto found = taken_.find(offset);
    if (found == taken_.end()) return;
    used -= found->second;
    taken_.erase(found);
  }

  // Lowest offset of a hole of nbytes within [low, high), or -1.
  int64_t first_fit(int64_t nbytes, int64_t low, int64_t high) const {
    int64_t length = rounded(nbytes);
    int64_t at = low;
    auto next = taken_.lower_bound(low);
    if (next != taken_.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second > at) at = before->first + before->second;
    }
    for (; next != taken_.end() && next->first < high; ++next) {
      if (next->first - at >= length) return at;
      at = next->first + next->second;
    }
    return high - at >= length ? at : -1;
  }

  int64_t largest_hole() const {
    int64_t at = 0, best = 0;
    for (auto& region : taken_) {
      if (region.first - at > best) best = region.first - at;
      at = region.first + region.second;
    }
    return size - at > best ? size - at : best;
  }

  // Promise places (nbytes, offset pairs) and a workspace region inside the arena to the next operator; how many are not free now.
  int expect(const int64_t* pairs, int64_t count, int64_t work_offset, int64_t work_nbytes) {
    done();
    strays.clear();
    work_at_ = work_offset;
    work_size_ = work_offset < 0 ? 0 : rounded(work_nbytes);
    int missing = 0;
    for (int64_t i = 0; i < count; ++i) {
      Place place{pairs[2 * i], pairs[2 * i + 1], false, false};
      place.reserved = take(place.offset, place.nbytes);
      missing += !place.reserved;
      places_.push_back(place);
    }
    return missing;
  }

  int play(int64_t row) {
    const int64_t* at = script.data() + script_rows[row];
    return expect(at + 3, at[0], at[1], at[2]);
  }

  // Where an allocation of the running operator goes: an offset, or -1 for nowhere in the arena.
  int64_t serve(int64_t nbytes) {
    for (auto& place : places_) {
      if (place.used || place.nbytes != nbytes) continue;
      if (!place.reserved && !take(place.offset, nbytes)) continue;
      place.reserved = place.used = true;
      return place.offset;
    }
    int64_t at = work_size_ > 0 ? first_fit(nbytes, work_at_, work_at_ + work_size_) : -1;
    if (at < 0 && stray == kStrayArena) at = first_fit(nbytes, 0, size);
    if (at >= 0) {
      take(at, nbytes);
      strays.emplace_back(base + at, nbytes);
    }
    return at;
  }

  // Take back the places that the operator did not use; how many.
  int done() {
    int unused = 0;
    for (auto& place : places_) {
      if (place.used) continue;
      ++unused;
      if (place.reserved) release(place.offset);
    }
    places_.clear();
    work_size_ = 0;
    return unused;
  }

  // Move a region; false if the new one is not free (it may overlap the old one). Copies no bytes.
  bool move(int64_t from, int64_t to) {
    auto found = taken_.find(from);
    if (found == taken_.end()) return false;
    int64_t length = found->second;
    release(from);
    if (take(to, length)) return true;
    take(from, length);
    return false;
  }

 private:
  std::map<int64_t, int64_t> taken_;  // offset -> rounded size
  std::vector<Place> places_;
  int64_t work_at_ = -1, work_size_ = 0;
};

}  // namespace weft
