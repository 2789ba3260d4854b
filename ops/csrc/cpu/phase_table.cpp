// Which functions serve a format in phases on which processor, and in which order they sum columns.
#include "phases.h"

namespace pikv::phases {

const KeyPhase* int_key_phase(int format, bool fast, int size, int blocks);
const ValuePhase* int_value_phase(int format, bool fast, int size);
const KeyPhase* float_key_phase(int format);
const ValuePhase* float_value_phase(int format);
decltype(KeyPhase::scores) amx_int_scores(int format);
decltype(ValuePhase::add) amx_int_add(int format);
decltype(KeyPhase::scores) amx_float_scores(int format);
decltype(ValuePhase::add) amx_float_add(int format);

namespace {
constexpr bool floats(int format) { return format == kBf16 || format == kFp8; }
}  // namespace

bool serves(Tier tier, int format) { return format_grouped(format) || (tier != Tier::kVnni && floats(format)); }

KeyPhase key_phase(Tier tier, int format, bool fast, int size, int blocks) {
  if (floats(format)) return tier == Tier::kAmx ? KeyPhase{nullptr, amx_float_scores(format)} : *float_key_phase(format);
  KeyPhase found = *int_key_phase(format, fast && tier != Tier::kAmx, size, blocks);
  if (tier == Tier::kAmx) found.scores = amx_int_scores(format);
  return found;
}

ValuePhase value_phase(Tier tier, int format, bool fast, int size) {
  ValuePhase found = floats(format) ? *float_value_phase(format) : *int_value_phase(format, fast && tier != Tier::kAmx, size);
  if (tier == Tier::kAmx) found.add = floats(format) ? amx_float_add(format) : amx_int_add(format);
  return found;
}

int sum_of(int format, int column) {
  if (format == kBf16) return column / 32 * 32 + column % 8 / 4 * 16 + column % 32 / 8 * 4 + column % 4;  // pairs of words
  // Four bytes of each 16, in four registers, those of several columns split after that.
  const int parts = 8 / format_bits(format), block = column / (64 * parts), byte = column % (64 * parts) / parts;
  return block * 64 * parts + (byte % 16 / 4 * parts + column % parts) * 16 + byte / 16 * 4 + byte % 4;
}

int query_of(int format, int e) {
  return format == kFp8 ? e / 64 * 64 + e % 32 / 8 * 16 + e % 64 / 32 * 8 + e % 8 : e;
}

}  // namespace pikv::phases
