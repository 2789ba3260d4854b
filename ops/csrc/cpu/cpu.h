// What this CPU can run, decided once, and how many threads torch uses.
#pragma once
#include <cstdint>

#include "attend.h"
#include "score.h"

namespace pikv {

AttendUnit generic_attend();
ScoreTable generic_score();
AttendUnit hand_written_attend(const Attend& a);  // null where this CPU or format has none
int64_t num_threads();

}  // namespace pikv
