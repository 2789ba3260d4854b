// Which functions serve a format in phases on which processor, and in which order they sum columns.
#include "phases.h"

namespace pikv::phases {

const KeyPhase* int_key_phase(int format, bool fold, bool fast, int size, int blocks);
const ValuePhase* int_value_phase(int format, bool fold, bool fast, int size);
const KeyPhase* float_key_phase(int format);
const ValuePhase* float_value_phase(int format);
KeyPhase fp4_key_phase();
ValuePhase fp4_value_phase();
void amx_int_keys(int format, bool fold, KeyPhase& key);
void amx_int_values(int format, bool fold, ValuePhase& value);
void amx_float_keys(int format, KeyPhase& key);
void amx_float_values(int format, ValuePhase& value);

namespace {
constexpr bool floats(int format) { return format == kBf16 || format == kFp8 || format == kFp4; }
}  // namespace

bool serves(Tier tier, int format) { return format_grouped(format) || (tier != Tier::kVnni && floats(format)); }

KeyPhase key_phase(Tier tier, int format, int dim, bool fast, int size) {
  const bool amx = tier == Tier::kAmx && size == kSizes - 1, fold = folds(format, dim);
  if (format == kFp4 && by_codes(tier, format)) return fp4_key_phase();
  KeyPhase found = floats(format) ? *float_key_phase(format) : *int_key_phase(format, fold, fast && !amx, size, row_blocks(format, dim));
  if (amx && floats(format)) amx_float_keys(format, found);
  else if (amx) amx_int_keys(format, fold, found);
  return found;
}

ValuePhase value_phase(Tier tier, int format, int dim, bool fast, int size) {
  const bool amx = tier == Tier::kAmx && size == kSizes - 1, fold = folds(format, dim);
  if (format == kFp4 && by_codes(tier, format)) return fp4_value_phase();
  ValuePhase found = floats(format) ? *float_value_phase(format) : *int_value_phase(format, fold, fast && !amx, size);
  if (amx && floats(format)) amx_float_values(format, found);
  else if (amx) amx_int_values(format, fold, found);
  return found;
}

int sum_of(Tier tier, int format, int dim, int column) {
  if (format == kFp4 && !by_codes(tier, format)) {  // even columns, then odd ones; pairs of words of each
    const int word = column % 64 / 2;
    return column / 64 * 64 + (column % 2 * 2 + word % 8 / 4) * 16 + word / 8 * 4 + word % 4;
  }
  if (format == kBf16) return column / 32 * 32 + column % 8 / 4 * 16 + column % 32 / 8 * 4 + column % 4;  // pairs of words
  // Four bytes of each 16, in four registers, those of several columns split after that.
  const bool fold = folds(format, dim);
  const int codes = 8 / format_bits(format), parts = fold ? codes / 2 : codes;  // of a byte; of it in another register each
  const int block = column / (64 * codes), byte = column % (64 * codes) / codes, code = column % codes;
  const int lane = byte / 16 + code / parts * 2;  // fold: the upper half of a byte is two lanes on
  return block * 64 * codes + (byte % 16 / 4 * parts + code % parts) * 16 + lane * 4 + byte % 4;
}

int query_of(Tier tier, int format, int dim, int e) {
  if (by_codes(tier, format) && format != kInt8) {  // codes of a byte by their places in it, 64 bytes at a time; fold: the upper half of a byte is 32 on
    const int codes = 8 / format_bits(format), width = 64 * codes;
    return folds(format, dim) ? e % 32 * codes + e % 64 / 32 * (codes / 2) + e / 64 : e / width * width + e % 64 * codes + e % width / 64;
  }
  if (format == kFp4) return e / 64 * 64 + e % 32 * 2 + e % 64 / 32;
  return format == kFp8 ? e / 64 * 64 + e % 32 / 8 * 16 + e % 64 / 32 * 8 + e % 8 : e;
}

}  // namespace pikv::phases
