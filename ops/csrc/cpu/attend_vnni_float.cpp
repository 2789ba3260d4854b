// Attention in f32: fp32 and fp16 pages, and any that must not round the query. A file of its own so that the three compile side by side.
#include "attend_vnni.h"

namespace pikv {

void attend_vnni_float(const Attend& a, const Unit& u) { by_width<kFp32>(a, u); }

}  // namespace pikv
