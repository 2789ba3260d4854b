// Attention of bf16 and fp8 pages. A file of its own so that the three compile side by side.
#include "attend_vnni.h"

namespace pikv {

void attend_vnni_half(const Attend& a, const Unit& u) {
  if (a.f.format == kBf16) by_width<kBf16>(a, u);
  else by_width<kFp8>(a, u);
}

}  // namespace pikv
