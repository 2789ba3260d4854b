// What a launch hands to a kernel: plain data, passed by value. ops/nvrtc/compiler.py has the same layouts in Python; tests/ops compares them.
//
// Files in kernels/ include nothing: nvcc, NVRTC and the host emulation compile the same text. Whoever compiles them puts page_format.h and
// then params, common, numbers in front.

namespace pikv {

// int32 or int64 integers, read as int32.
struct Index {
  const void* data;  // null = not given
  int wide;
};

// N block tables = R requests x S shards; H kv heads; a request has T queries, a kv head G query heads: M = T * G rows, row t * G + g.
struct Attend {
  PageFormat f;
  const unsigned char* pages;
  Index table;      // [N, table_heads, max_pages]
  Index seqlens;    // [N, seqlen_heads]
  Index asked;      // [R, T] positions of the queries
  Index list;       // [N, list_heads, num_columns] blocks of the table's pages, column * blocks + block, -1 = none; null = every one
  Index tail_rows;  // [N, tail_heads]
  const void* tail;  // [rows, f.num_kv_heads, group, k_dim] of tail_type
  const void* q;     // [R, T, H * G, k_dim] of q_type
  float* out;        // [R, T, H * G, v_dim]
  float* lse;        // [R, T, H * G]
  float* part_out;   // [parts, M, v_dim] or null = every table is one part and S is 1: straight to out and lse
  float* part_lse;   // [parts, M]
  float* page_lse;   // [N, T, H * G, num_columns] or null
  int tail_type, q_type;  // kFp32, kBf16 or kFp16
  int R, T, S, H, G, max_pages, num_columns;
  int block, blocks;  // tokens that a list and page_lse name as one, and how many of these a page has: 1, and the page is one, or more
  int unit;     // tokens of a block that a warp takes at a time, see work.cuh
  int workers;  // which share the rounds of all tables; 0 = `splits` parts of each table
  int splits, least;  // least: rounds of a worker that has any
  int tail_parts;     // the first part of a tail, one of each table that has any; 0 = the tail belongs to the other parts
  int table_heads, seqlen_heads, list_heads, tail_heads;
  int window, causal;
  float scale;
};

struct Merge {
  const float* out;  // [S, rows, D]
  const float* lse;  // [S, rows]
  float* merged;     // [rows, D]
  float* merged_lse;
  long long rows;
  int S, D;
};

struct Append {
  PageFormat f;
  unsigned char* pages;
  void* tail;                            // [rows, H, group, k_dim] of tail_type
  const void *k, *v;                     // [T, H, k_dim], [T, H, v_dim] of type
  Index positions, slots, tail_rows;     // [T]
  int T, type, tail_type;
};

struct Migrate {
  unsigned char* target;
  const unsigned char* source;
  Index target_ids, source_ids;  // [n]
  long long record_bytes;
};

struct PageBounds {
  PageFormat f;
  const unsigned char* pages;
  void* bounds;            // [num_pages * blocks, H, 2, k_dim] of type, int8 k_dim + 2: smallest, largest
  const void* tail;        // as in Append
  Index slots, tail_rows;  // [T]
  int T, type, tail_type;
  int block;  // tokens that have bounds of their own: those of block b of page p at p * (page_size / block) + b
};

// N block tables = R requests x S shards.
struct PageScore {
  const void* q;       // [R, H * G, D] of q_type
  const void* width;   // the same shape and type; null = |q|
  const void* bounds;  // [num_pages, bound_heads, 2, D] of bounds_type, int8 D + 2
  Index table;         // [N, table_heads, max_pages]
  Index seqlens;       // [N, seqlen_heads]
  float* scores;       // [N, H, max_pages]
  int q_type, bounds_type, S, H, G, D, max_pages, page_size, bound_heads, table_heads, seqlen_heads;
  float scale;
};

// Row r of a field lies at byte offset + r * stride of the buffer, for r < num_packed.
struct PackedField {
  unsigned char* data;  // [rows, row_bytes]
  long long rows, row_bytes, offset, stride, num_packed;
  unsigned long long padding;  // -1 in the dtype of the field, repeated
};

struct Packed {
  unsigned char* buffer;
  Index index;  // [num_packed] rows of the fields, -1 = none; null = row r
  PackedField fields[16];
};

// N tokens; R rows x S shards have a block table each.
struct AssignSlots {
  int* counts;            // [R, S]
  int* table;             // [R, S, max_pages]
  const int* free_stack;  // the first *free_top are free pages
  long long* free_top;
  int* refcount;
  const long long *rows, *shard;  // [N]; shard null = S is 1
  const unsigned char* here;      // [N] or null = all are
  int *slots, *tables;            // [N] results
  int N, R, S, max_pages, page_size, may_open;
};

// Rows of a field in a message: of token t at start + t * row_bytes.
struct RouteField {
  unsigned char* data;  // [rows, row_bytes]; of messages that arrived [G * N, row_bytes]
  long long rows, row_bytes, start;
  unsigned long long padding;  // as in PackedField
  int group;                   // -1 = every rank gets all rows
};

// G messages of `most` bytes each; K groups of rows, N tokens of a rank.
struct Route {
  unsigned char* buffer;
  const unsigned char* need;  // [K, G, N]
  int* tokens;                // [K, G * N]
  int* counts;                // [K, G]
  long long most, token_start[4];
  RouteField fields[8];
  int G, N, K, num_fields;
};

struct RouteMerge {
  const float* partials;      // [G * N, H, D + 1]: out, lse
  const unsigned char* need;  // [G, N]
  float* out;                 // [N, H, D]
  float* lse;                 // [N, H]
  int G, N, H, D, order[256];
};

struct Checksum {
  const unsigned long long* words;
  long long count;
  unsigned long long* result;  // 0 before
};

}  // namespace pikv
