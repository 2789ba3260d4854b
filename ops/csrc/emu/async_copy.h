// Copies that run beside the threads, under the emulation: cp.async in groups, and bulk copies that an mbarrier counts. Part of simt_host.h.
//
// Nothing is copied before it must be there: at the wait for its group or for the phase of its barrier. So what is read without a wait is
// what was there before: NaN, as shared memory starts, or the tile of the round before.
#pragma once

namespace simt {

// cp.async of this thread, cp.async.commit_group, and cp.async.wait_group: all but the newest `pending` groups are there.
void copy_async(void* to, const void* from, size_t bytes, Site site);
void commit_copies();
void wait_copies(int pending);

// mbarrier in 8 bytes of shared memory. `threads` arrive in a phase; the phase ends when they have, and all bytes that they expect are there.
void barrier_init(uint64_t* barrier, unsigned threads, Site site);
void barrier_arrive(uint64_t* barrier, unsigned bytes, Site site);  // expects so many more bytes
void bulk_copy(void* to, const void* from, size_t bytes, uint64_t* barrier, Site site);
void barrier_wait(uint64_t* barrier, unsigned parity, Site site);  // until the phase of this parity has ended

}  // namespace simt

inline void pk_copy_async(void* to, const void* from, size_t bytes, PK_SITE) { simt::copy_async(to, from, bytes, {file, line}); }
inline void pk_barrier_init(uint64_t* b, unsigned threads, PK_SITE) { simt::barrier_init(b, threads, {file, line}); }
inline void pk_barrier_arrive(uint64_t* b, unsigned bytes, PK_SITE) { simt::barrier_arrive(b, bytes, {file, line}); }
inline void pk_bulk_copy(void* to, const void* from, size_t bytes, uint64_t* b, PK_SITE) { simt::bulk_copy(to, from, bytes, b, {file, line}); }
inline void pk_barrier_wait(uint64_t* b, unsigned parity, PK_SITE) { simt::barrier_wait(b, parity, {file, line}); }
