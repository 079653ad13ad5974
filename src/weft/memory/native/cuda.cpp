// torch's pluggable CUDA allocator (`weft_malloc`, `weft_free`) over the same books and arenas as the CPU's.
//
// The CUDA driver is given as four functions, so nothing of CUDA is needed to compile this and everything can be tried with memory of
// the host. Outside arenas freed blocks are kept for requests of the same size on the same stream, since the driver's own
// allocation waits for the device. One device per process.
// Streams: work already queued on a stream may still use bytes that are given out again to the same stream, never to another one. An
// arena therefore waits for the device when it serves another stream than before, and when it gets back a block of another stream
// than it serves now; so does any block that another stream has used (`record_stream`), when it is freed.

#include <cstddef>
#include <cstdint>

namespace weft {

struct Driver {
  int (*allocate)(void**, size_t) = nullptr;  // cuMemAlloc
  int (*release)(void*) = nullptr;            // cuMemFree
  int (*synchronize)() = nullptr;             // cuCtxSynchronize
};

inline Driver driver;

struct Backing {
  static void* reserve(int64_t size) {
    void* base = nullptr;
    return driver.allocate && driver.allocate(&base, static_cast<size_t>(size)) == 0 ? base : nullptr;
  }
  static void unreserve(void* base, int64_t) { driver.release(base); }
};

inline Backing backing;

}  // namespace weft

#include "control.h"

#include <unordered_set>

namespace weft {
namespace {

constexpr int64_t kRounding = 512;

thread_local std::string refusal;

void owned(void*) {}  // marks blocks that torch frees through `weft_free`

struct Cuda {
  int device = -1;
  std::map<std::pair<int64_t, void*>, std::vector<void*>> kept;  // (rounded bytes, stream) -> free blocks
  std::unordered_set<void*> shared;                               // blocks that another stream has used
  std::unordered_map<Arena*, void*> stream;                       // that an arena served last

  void* outside(int64_t nbytes, void* on) {
    int64_t rounded = (nbytes + kRounding - 1) / kRounding * kRounding;
    auto& free = kept[{rounded, on}];
    if (!free.empty()) {
      void* address = free.back();
      free.pop_back();
      return address;
    }
    void* address = backing.reserve(rounded);
    if (address) return address;
    give_back();
    address = backing.reserve(rounded);
    if (!address) refuse("the device has no " + bytes(rounded) + " left; " + bytes(state().ledger.live) + " are alive");
    return address;
  }

  void give_back() {
    driver.synchronize();
    for (auto& entry : kept)
      for (void* address : entry.second) driver.release(address);
    kept.clear();
  }
};

Cuda& cuda() {
  static Cuda& only = *new Cuda();
  return only;
}

}  // namespace
}  // namespace weft

WEFT_API void weft_driver(int (*allocate)(void**, size_t), int (*release)(void*), int (*synchronize)()) {
  weft::Lock lock(weft::state().mutex);
  weft::driver = {allocate, release, synchronize};
}

// Free blocks outside arenas go back to the device.
WEFT_API void weft_empty_cache() {
  weft::Lock lock(weft::state().mutex);
  weft::cuda().give_back();
}

WEFT_API void* weft_malloc(std::ptrdiff_t nbytes, int device, void* stream) {
  if (nbytes <= 0) return nullptr;
  weft::Lock lock(weft::state().mutex);
  auto& own = weft::cuda();
  if (own.device < 0) own.device = device;
  if (own.device != device)
    weft::refuse("this process has memory on CUDA device " + std::to_string(own.device) + ", and asks for some on device " +
                 std::to_string(device) + "; use one process per device");
  void* address = weft::admit(nbytes);
  if (address) {
    auto before = own.stream.find(weft::thread.serving);
    if (before != own.stream.end() && before->second != stream) weft::driver.synchronize();
    own.stream[weft::thread.serving] = stream;
    return address;
  }
  address = own.outside(nbytes, stream);
  weft::Block block;
  block.nbytes = nbytes;
  block.release = &weft::owned;
  weft::enter(address, block);
  if (weft::thread.serving) weft::thread.serving->strays.emplace_back(address, nbytes);
  return address;
}

// For callers that cannot catch: null where `weft_malloc` throws.
WEFT_API void* weft_malloc_or_null(std::ptrdiff_t nbytes, int device, void* stream) {
  try {
    return weft_malloc(nbytes, device, stream);
  } catch (const c10::Error& error) {
    weft::refusal = error.what_without_backtrace();
    return nullptr;
  }
}

// Why the last `weft_malloc_or_null` of this thread returned null.
WEFT_API const char* weft_refusal() { return weft::refusal.c_str(); }

WEFT_API void weft_free(void* address, std::ptrdiff_t nbytes, int, void* stream) {
  if (address == nullptr) return;
  weft::Lock lock(weft::state().mutex);
  auto& own = weft::cuda();
  if (own.shared.erase(address)) weft::driver.synchronize();
  weft::Block block = weft::state().ledger.died(address);
  if (block.arena) {
    auto* arena = static_cast<weft::Arena*>(block.arena);
    if (own.stream[arena] != stream) weft::driver.synchronize();
    weft::release(arena, address);
    return;
  }
  int64_t rounded = (nbytes + weft::kRounding - 1) / weft::kRounding * weft::kRounding;
  own.kept[{rounded, stream}].push_back(address);
}

WEFT_API void weft_record_stream(void* address, void*) {
  weft::Lock lock(weft::state().mutex);
  weft::cuda().shared.insert(address);
}
