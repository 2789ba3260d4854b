// What serves on this CPU.
#pragma once
#include <cstdint>

#include "attend.h"
#include "score.h"

namespace pikv {

AttendUnit generic_attend();
ScoreTable score_kernel(int bounds_type);
AttendUnit hand_written_attend(Attend& a);  // null where this CPU or format has none; says how to read ahead

}  // namespace pikv
