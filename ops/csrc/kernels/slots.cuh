// Slots for new entries, in the order of ops/reference/slots.py. One block: the free stack serves the tokens one after another.

namespace pikv {

__global__ void __launch_bounds__(kBlock) assign_slots_kernel(const AssignSlots a) {
  PK_SHARED(shared);
  int* cells = reinterpret_cast<int*>(shared);  // [kBlock] the table of each token of this round, -1 = not stored here
  int* opens = cells + kBlock;                  // [kBlock] 1 = it takes a page
  const int i = threadIdx.x;
  for (int first = 0; first < a.N; first += kBlock) {
    const int token = first + i;
    const bool stored = token < a.N && (!a.here || a.here[token]);
    const long long row = stored ? a.rows[token] : 0, shard = stored && a.shard ? a.shard[token] : 0;
    if (row < 0 || row >= a.R || shard < 0 || shard >= a.S) __trap();
    const int cell = (int)(row * a.S + shard);
    cells[i] = stored ? cell : -1;
    __syncthreads();
    int index = a.counts[cell];
    for (int j = 0; j < i; ++j) index += cells[j] == cell;
    const int column = index / a.page_size, offset = index % a.page_size;
    opens[i] = stored && offset == 0;
    __syncthreads();
    int before = 0, taken = 0;
    for (int j = 0; j < kBlock; ++j) before += j < i ? opens[j] : 0, taken += opens[j];
    const long long top = *a.free_top;
    int* page = a.table + (long long)cell * a.max_pages + column;
    // Room was reserved by the host; writing beyond it would damage another request.
    if (stored && (column >= a.max_pages - 1 || (opens[i] && (!a.may_open || top <= before)))) __trap();
    if (opens[i]) {
      *page = a.free_stack[top - 1 - before];
      ++a.refcount[*page];
    }
    __syncthreads();
    if (stored) atomicAdd(a.counts + cell, 1);
    if (token < a.N) a.slots[token] = stored ? *page * a.page_size + offset : -1, a.tables[token] = stored ? cell : 0;
    if (i == 0) *a.free_top = top - taken;
    __syncthreads();
  }
}

}  // namespace pikv
