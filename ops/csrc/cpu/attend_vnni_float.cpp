// Attention of fp32 and fp16 pages. A file of its own so that the three compile side by side.
#include "attend_vnni.h"

namespace pikv {

void attend_vnni_float(const Attend& a, const Unit& u) {
  if (a.f.format == kFp32) by_width<kFp32>(a, u);
  else by_width<kFp16>(a, u);
}

}  // namespace pikv
