// A c10 allocator in front of torch's CPU allocator: keeps the books, and serves a thread's arena when there is one.
//
// Outside arenas the bytes come from the allocator that was there before (so alignment, huge pages and the profiler's reports stay
// as they are). `raw_deleter` must be the deleter of every allocation and context must equal data: oneDNN allocates that way.
// Storages older than the hook are adopted by changing their deleter, which is only done where it was the inner allocator's own.

#include <sys/mman.h>

#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>

namespace weft {

struct Backing {
  static void* reserve(int64_t size) {
    void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return base == MAP_FAILED ? nullptr : base;
  }
  static void unreserve(void* base, int64_t size) { munmap(base, size); }
};

inline Backing backing;

}  // namespace weft

#include "control.h"

namespace weft {
namespace {

const c10::Device cpu(c10::DeviceType::CPU);

void weft_delete(void* address) {
  State& s = state();
  Block block;
  {
    Lock lock(s.mutex);
    block = s.ledger.died(address);
    if (block.arena) {
      c10::profiledCPUMemoryReporter().Delete(address);
      release(static_cast<Arena*>(block.arena), address);
    }
  }
  if (block.release) block.release(address);
}

class Counting final : public c10::Allocator {
 public:
  c10::Allocator* inner = nullptr;

  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, nullptr, &weft_delete, cpu};
    State& s = state();
    Lock lock(s.mutex);  // held while the bytes are had, so that no other thread passes the same cap meanwhile
    void* address = admit(static_cast<int64_t>(nbytes));
    if (address) {
      c10::profiledCPUMemoryReporter().New(address, nbytes);
    } else {
      Block block;
      block.nbytes = static_cast<int64_t>(nbytes);
      block.release = inner->raw_deleter();
      address = inner->raw_allocate(nbytes);
      enter(address, block);
      Arena* arena = thread.serving;
      if (arena) arena->strays.emplace_back(address, block.nbytes);
    }
    return {address, address, &weft_delete, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &weft_delete; }
  bool is_simple_data_ptr(const c10::DataPtr& pointer) const override { return pointer.get() == pointer.get_context(); }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

Counting& counting() {
  static Counting& only = *new Counting();
  return only;
}

c10::StorageImpl& impl(void* storage) { return *static_cast<c10::StorageImpl*>(storage); }

// The block that a storage's bytes are, or null. Locked.
Block* block_of(void* storage) {
  auto& blocks = state().ledger.blocks;
  auto found = blocks.find(impl(storage)._mutable_data_ptr_no_checks().get());
  return found == blocks.end() ? nullptr : &found->second;
}

void point(void* storage, void* address) {
  impl(storage).set_data_ptr_noswap(c10::DataPtr(address, address, &weft_delete, cpu));
}

}  // namespace
}  // namespace weft

// 0 in place, 1 if the allocator there cannot be put behind this one, 2 if torch refused (another one has priority)
WEFT_API int weft_install() {
  auto& own = weft::counting();
  c10::Allocator* there = c10::GetCPUAllocator();
  if (there == &own) return 0;
  if (there->raw_deleter() == nullptr) return 1;
  own.inner = there;
  c10::SetCPUAllocator(&own);
  return c10::GetCPUAllocator() == &own ? 0 : 2;
}

WEFT_API int weft_uninstall() {
  auto& own = weft::counting();
  if (c10::GetCPUAllocator() != &own) return 0;
  c10::SetCPUAllocator(own.inner);
  return 0;
}

// Count a storage's bytes under a category, in window w too: 0 it has none, 1 done, 2 done but its death will not be seen.
WEFT_API int weft_adopt(void* storage, int category, int w) {
  auto& pointer = weft::impl(storage)._mutable_data_ptr_no_checks();
  void* address = pointer.get();
  int64_t nbytes = static_cast<int64_t>(weft::impl(storage).nbytes());
  if (address == nullptr || nbytes == 0) return 0;
  auto* inner = weft::counting().inner;
  if (inner && pointer.get_context() == address && pointer.compare_exchange_deleter(inner->raw_deleter(), &weft::weft_delete)) {
    weft::Block block;
    block.nbytes = nbytes;
    block.category = category;
    block.release = inner->raw_deleter();
    weft::Lock lock(weft::state().mutex);
    weft::state().ledger.adopted(address, block);
  }
  return weft_count(address, nbytes, category, w);
}

// -- bytes of storages ----------------------------------------------------------------------------------------------------

WEFT_API int64_t weft_storage_offset(weft::Arena* arena, void* storage) {
  weft::Lock lock(weft::state().mutex);
  auto* block = weft::block_of(storage);
  if (block == nullptr || block->arena != arena) return -1;
  return static_cast<char*>(weft::impl(storage)._mutable_data_ptr_no_checks().get()) - arena->base;
}

// 0 moved, -1 its bytes are not in this arena, -2 the new place is not free
WEFT_API int weft_storage_move(weft::Arena* arena, void* storage, int64_t offset) {
  auto& s = weft::state();
  auto& pointer = weft::impl(storage)._mutable_data_ptr_no_checks();
  weft::Lock lock(s.mutex);
  auto* block = weft::block_of(storage);
  if (block == nullptr || block->arena != arena) return -1;
  char* from = static_cast<char*>(pointer.get());
  char* to = arena->base + offset;
  if (!arena->move(from - arena->base, offset)) return -2;
  if (from == to) return 0;
  std::memmove(to, from, block->nbytes);
  c10::profiledCPUMemoryReporter().Delete(from);
  c10::profiledCPUMemoryReporter().New(to, block->nbytes);
  s.ledger.moved(from, to);
  pointer.release_context();  // the books already have it at its new address
  weft::point(storage, to);
  return 0;
}

WEFT_API void weft_storage_drop(void* storage) {
  weft::impl(storage).set_data_ptr_noswap(c10::DataPtr(nullptr, weft::cpu));
}

// Whoever reads or writes the bytes of a storage gets `message` as an error, until it is swapped with another one.
WEFT_API void weft_storage_forbid(void* storage, const char* message) {
  weft::impl(storage).release_data_and_set_meta_custom_data_ptr_error_msg_(std::string(message));
}

// 0 done, -1 the storage has bytes already, -2 the place is not free, -3 a cap
WEFT_API int weft_storage_place(weft::Arena* arena, void* storage, int64_t nbytes, int64_t offset) {
  auto& s = weft::state();
  if (weft::impl(storage)._mutable_data_ptr_no_checks().get() != nullptr) return -1;
  weft::Lock lock(s.mutex);
  if (s.ledger.refusing(nbytes) >= 0) return -3;
  if (!arena->take(offset, nbytes)) return -2;
  weft::Block block;
  block.nbytes = nbytes;
  block.arena = arena;
  s.ledger.born(arena->base + offset, block);
  c10::profiledCPUMemoryReporter().New(arena->base + offset, nbytes);
  weft::point(storage, arena->base + offset);
  return 0;
}

// 0 done, -1 the receiver has bytes already
WEFT_API int weft_storage_give(void* donor, void* storage) {
  if (weft::impl(storage)._mutable_data_ptr_no_checks().get() != nullptr) return -1;
  weft::impl(storage).set_data_ptr_noswap(std::move(weft::impl(donor)._mutable_data_ptr_no_checks()));
  weft_storage_drop(donor);
  return 0;
}
