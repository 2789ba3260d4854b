#include "simt_host.h"

#include <cstdio>
#include <cstdlib>
#include <map>
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

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  void run() const { std::memcpy(to, from, bytes); }
};

struct Barrier {
  unsigned threads = 0, arrived = 0, phase = 0;
  size_t expected = 0, issued = 0;
  std::vector<Copy> copies;

  bool due() const { return threads && arrived >= threads && issued >= expected; }
  // As late as may be: when somebody waits for it, or the next phase begins.
  void end_phase() {
    for (const Copy& copy : copies) copy.run();
    copies.clear();
    arrived = 0, expected = issued = 0, ++phase;
  }
  // Whether the phase of this parity is over.
  bool passes(unsigned parity) {
    if ((phase & 1) == parity && due()) end_phase();
    return (phase & 1) != parity;
  }
};

struct Thread : Fiber {
  Context context;
  char* stack;
  std::vector<std::vector<Copy>> groups;  // cp.async, oldest first; the last is open
  Barrier* awaited;
  unsigned parity;
};

struct Warp {
  unsigned char value[2][32][kSlot];
};

std::vector<Thread*> threads;
std::vector<Warp> warps;
std::vector<char> shared_memory;
std::map<const void*, Barrier> barriers;
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
    if (t->wait == Wait::copy && t->awaited->passes(t->parity)) t->wait = Wait::none;
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
  for (int i = 0; i < count; ++i)
    if (threads[i]->wait == Wait::copy) report("a copy that is waited for never comes", *threads[i], threads[i]->site);
  return true;
}

void prepare_block(int count) {
  std::memset(shared_memory.data(), 0xff, shared_memory.size());
  barriers.clear();
  for (int i = 0; i < count; ++i) {
    Thread& t = *threads[i];
    t.groups.assign(1, {});
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

const unsigned char* collect(const void* value, size_t bytes, Site site) {
  if (bytes > kSlot) fail("more than 48 bytes of a lane in one exchange", site);
  auto& slots = warps[current->linear / 32].value[current->exchanges++ & 1];
  std::memcpy(slots[current->linear % 32], value, bytes);
  current->site = site, current->wait = Wait::warp;
  yield();
  return slots[0];
}

void copy_async(void* to, const void* from, size_t bytes, Site site) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async copies 4, 8 or 16 bytes", site);
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) fail("cp.async from or to a place that is not aligned", site);
  static_cast<Thread*>(current)->groups.back().push_back({to, from, bytes});
}

void commit_copies() { static_cast<Thread*>(current)->groups.emplace_back(); }

void wait_copies(int pending) {
  auto& groups = static_cast<Thread*>(current)->groups;
  while ((int)groups.size() - 1 > pending) {
    for (const Copy& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

namespace {
Barrier& barrier_at(const uint64_t* barrier, Site site) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("an mbarrier that nobody has made", site);
  return found->second;
}
}  // namespace

void barrier_init(uint64_t* barrier, unsigned threads, Site) { barriers[barrier] = {}, barriers[barrier].threads = threads; }

void barrier_arrive(uint64_t* barrier, unsigned bytes, Site site) {
  Barrier& b = barrier_at(barrier, site);
  if (b.due()) b.end_phase();
  ++b.arrived, b.expected += bytes;
}

void bulk_copy(void* to, const void* from, size_t bytes, uint64_t* barrier, Site site) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) fail("a bulk copy of what is not aligned to 16 bytes", site);
  Barrier& b = barrier_at(barrier, site);
  if (b.due()) b.end_phase();
  b.copies.push_back({to, from, bytes}), b.issued += bytes;
}

void barrier_wait(uint64_t* barrier, unsigned parity, Site site) {
  Thread* t = static_cast<Thread*>(current);
  t->awaited = &barrier_at(barrier, site), t->parity = parity;
  if (t->awaited->passes(parity)) return;
  t->site = site, t->wait = Wait::copy;
  yield();
}

void exchange(unsigned mask, void* value, size_t bytes, int source, Site site) {
  if (mask != 0xffffffffu) fail("the mask of a shuffle must be the whole warp", site);
  if (source < 0 || source > 31) fail("a shuffle reads a lane outside the warp", site);
  if (bytes > 16) fail("a shuffle of more than 16 bytes", site);
  std::memcpy(value, collect(value, bytes, site) + source * kSlot, bytes);
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
