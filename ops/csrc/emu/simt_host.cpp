#include "simt_host.h"

#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

// PK_EMU_UCONTEXT: the fallback of other processors, also on x86-64, so that it can be tested.
#if !defined(__x86_64__) || defined(PK_EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

Fiber* current;
int vote;
uint3 block_index;
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kStack = 128 << 10;

#if defined(__x86_64__) && !defined(PK_EMU_UCONTEXT)
extern "C" void pikv_simt_switch(void** save, void* load);
asm(R"(
.text
.type pikv_simt_switch,@function
pikv_simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size pikv_simt_switch,.-pikv_simt_switch
)");

// Callee-saved registers and the stack pointer; kernels do not touch the floating-point control words.
struct Context {
  void* sp = nullptr;
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack - 64);
    *--top = nullptr;  // the return address of `entry`, which never returns; also aligns the stack as a call would
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    sp = top;
  }
};
void switch_context(Context& from, Context& to) { pikv_simt_switch(&from.sp, to.sp); }
#else
struct Context {
  ucontext_t state;
  void start(char* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = kStack;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
};
void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

struct Thread : Fiber {
  Context context;
  char* stack;
};

struct Warp {
  unsigned char value[2][32][16];
};

std::vector<Thread*> threads;
std::vector<Warp> warps;
std::vector<char> shared_memory;
Context scheduler;
void (*kernel)(void*);
void* kernel_argument;
bool reverse_order;
long long num_switches;
char message[512];

void yield() {
  ++num_switches;
  switch_context(static_cast<Thread*>(current)->context, scheduler);
}

void entry() {
  kernel(kernel_argument);
  current->wait = Wait::done;
  yield();
  std::abort();  // a finished fiber is never resumed
}

void report(const char* what, const Fiber& f, Site site) {
  if (message[0]) return;  // the first fault is the cause
  std::snprintf(message, sizeof message, "%s: block (%u, %u, %u) thread %d at %s:%d", what, block_index.x, block_index.y, block_index.z, f.linear,
                site.file ? site.file : "the start of the kernel", site.line);
}

// A warp whose live lanes all wait for the same exchange goes on.
bool release_warps(int count) {
  bool released = false;
  for (int first = 0; first < count; first += 32) {
    const int last = first + 32 < count ? first + 32 : count;
    int waiting = 0;
    for (int i = first; i < last; ++i) waiting += threads[i]->wait == Wait::warp;
    if (waiting != last - first) continue;
    for (int i = first; i < last; ++i) {
      if (threads[i]->site != threads[first]->site) report("lanes of a warp exchange at different lines", *threads[i], threads[i]->site);
      threads[i]->wait = Wait::none;
    }
    released = true;
  }
  return released;
}

// True when the block is done or has failed.
bool advance(int count) {
  bool ran = false;
  for (int j = 0; j < count && !message[0]; ++j) {
    Thread* t = threads[reverse_order ? count - 1 - j : j];
    if (t->wait != Wait::none) continue;
    current = t;
    switch_context(scheduler, t->context);
    ran = true;
  }
  if (message[0]) return true;
  int done = 0, at_barrier = 0;
  for (int i = 0; i < count; ++i) done += threads[i]->wait == Wait::done, at_barrier += threads[i]->wait == Wait::block;
  if (done == count) return true;
  if (at_barrier == count) {
    for (int i = 0; i < count; ++i) {
      if (threads[i]->site != threads[0]->site) report("threads wait in different __syncthreads", *threads[i], threads[i]->site);
      threads[i]->wait = Wait::none;
    }
    return message[0] != 0;
  }
  if (release_warps(count) || ran) return message[0] != 0;
  for (int i = 0; i < count; ++i)
    if (threads[i]->wait == Wait::block) report("divergent __syncthreads: other threads never reach it", *threads[i], threads[i]->site);
  for (int i = 0; i < count; ++i)
    if (threads[i]->wait == Wait::warp) report("divergent shuffle: other lanes never reach it", *threads[i], threads[i]->site);
  return true;
}

void prepare_block(int count) {
  std::memset(shared_memory.data(), 0xff, shared_memory.size());
  for (int i = 0; i < count; ++i) {
    Thread& t = *threads[i];
    t.linear = i, t.wait = Wait::none, t.exchanges = 0, t.site = {nullptr, 0};
    t.index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y)};
    t.context.start(t.stack, entry);
  }
}

}  // namespace

void* shared() { return shared_memory.data(); }
void set_reverse(bool reverse) { reverse_order = reverse; }
long long switches() { return num_switches; }

void fail(const char* what, Site site) {
  report(what, *current, site);
  yield();
  std::abort();  // the scheduler does not come back to a block that failed
}

void wait_block(Site site) {
  current->site = site, current->wait = Wait::block;
  yield();
}

void exchange(unsigned mask, void* value, size_t bytes, int source, Site site) {
  if (mask != 0xffffffffu) fail("the mask of a shuffle must be the whole warp", site);
  if (source < 0 || source > 31) fail("a shuffle reads a lane outside the warp", site);
  if (bytes > sizeof warps[0].value[0][0]) fail("a shuffle of more than 16 bytes", site);
  Warp& warp = warps[current->linear / 32];
  auto& slots = warp.value[current->exchanges++ & 1];
  std::memcpy(slots[current->linear % 32], value, bytes);
  current->site = site, current->wait = Wait::warp;
  yield();
  std::memcpy(value, slots[source], bytes);
}

const char* run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
  message[0] = 0;
  vote = 0;
  grid_dim = grid, block_dim = block, kernel = body, kernel_argument = argument;
  const int count = block.x * block.y * block.z;
  while ((int)threads.size() < count) {
    Thread* t = new Thread();
    t->stack = static_cast<char*>(std::aligned_alloc(64, kStack));
    if (!t->stack) throw std::bad_alloc();
    threads.push_back(t);
  }
  warps.resize((count + 31) / 32);
  shared_memory.resize(shared_bytes);
  for (unsigned z = 0; z < grid.z && !message[0]; ++z)
    for (unsigned y = 0; y < grid.y && !message[0]; ++y)
      for (unsigned x = 0; x < grid.x && !message[0]; ++x) {
        block_index = reverse_order ? uint3{grid.x - 1 - x, grid.y - 1 - y, grid.z - 1 - z} : uint3{x, y, z};
        prepare_block(count);
        while (!advance(count)) {
        }
      }
  current = nullptr;
  return message[0] ? message : nullptr;
}

}  // namespace simt

// For tests, which see the library only through torch.
extern "C" void pikv_emu_in_reverse(int reverse) { simt::set_reverse(reverse); }
