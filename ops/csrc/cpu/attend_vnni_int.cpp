// Attention of int8 and int4 pages. A file of its own so that the three compile side by side.
#include "attend_vnni.h"

namespace pikv {

void attend_vnni_int(const Attend& a, const Unit& u) {
  if (a.f.format == kInt8) by_width<kInt8>(a, u);
  else by_width<kInt4>(a, u);
}

}  // namespace pikv
