// Tells the allocators where operators begin and end, so that they can tell workspace from activations.
//
// A library of its own because torch's header for observers takes longer to compile than everything else together. Only operators
// count (their records know their arguments); a user's autograd function or a named scope is not one operator.

#include <ATen/record_function.h>

#include <atomic>

#define WEFT_API extern "C" __attribute__((visibility("default")))

namespace {

using Note = void (*)();

struct Listener {
  std::atomic<Note> begin{nullptr}, end{nullptr};
};

constexpr int kListeners = 2;  // the CPU's allocator and CUDA's
Listener listeners[kListeners];
at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
thread_local int depth = 0;  // of records within an operator, itself included

std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& record) {
  if (depth == 0 && record.num_inputs() == 0) return nullptr;
  if (depth++ > 0) return nullptr;
  for (auto& listener : listeners)
    if (Note begin = listener.begin) begin();
  return nullptr;
}

void on_end(const at::RecordFunction&, at::ObserverContext*) {
  if (depth == 0) return;  // observing began inside of it, or it is no operator
  if (--depth > 0) return;
  for (auto& listener : listeners)
    if (Note end = listener.end) end();
}

}  // namespace

// Begin to tell a listener (0 or 1).
WEFT_API void weft_operators_on(int which, Note begin, Note end) {
  listeners[which].end = end;
  listeners[which].begin = begin;
  if (handle == at::INVALID_CALLBACK_HANDLE)
    handle = at::addGlobalCallback(at::RecordFunctionCallback(&on_start, &on_end).scopes({at::RecordScope::FUNCTION}));
}

// No operator begins for it any more; the last one that has begun still ends.
WEFT_API void weft_operators_off(int which) {
  listeners[which].begin = nullptr;
  for (auto& listener : listeners)
    if (listener.begin) return;
  if (handle == at::INVALID_CALLBACK_HANDLE) return;
  at::removeCallback(handle);
  handle = at::INVALID_CALLBACK_HANDLE;
}
