#ifndef CEREBELLUM_HALVES_H
#define CEREBELLUM_HALVES_H

#include <stdint.h>
#include <string.h>

/* ---- fp16 in integer code: no compiler's or machine's own conversion has a say -------------------- */

#define HALF_LEAST 5.9604644775390625e-8f /* 2^-24, the smallest fp16 above zero */

/* Rounds half to even; beyond the largest finite fp16 stays at it. */
static inline uint16_t half_bits(float value) {
  uint32_t u;
  memcpy(&u, &value, 4);
  uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a >= 0x477fe000u) return (uint16_t)(sign | 0x7bffu);
  if (a >= 0x38800000u) return (uint16_t)(sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13));
  float tiny;
  memcpy(&tiny, &a, 4);
  tiny = (tiny * 16777216.0f + 8388608.0f) - 8388608.0f;
  uint32_t steps = (uint32_t)tiny;
  return (uint16_t)(steps ? sign | steps : 0u); /* no negative zero: its sign is nobody's business */
}

static inline float half_value(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16, e = (half >> 10) & 31u, m = half & 1023u, u;
  if (e == 0) {
    float tiny = (float)m * HALF_LEAST;
    return sign ? -tiny : tiny;
  }
  u = sign | ((e + 112u) << 23) | (m << 13);
  float value;
  memcpy(&value, &u, 4);
  return value;
}

static inline void put_half(uint8_t *at, float value) {
  uint16_t bits = half_bits(value);
  at[0] = (uint8_t)(bits & 255u);
  at[1] = (uint8_t)(bits >> 8);
}

static inline float get_half(const uint8_t *at) { return half_value((uint16_t)(at[0] | (at[1] << 8))); }

#endif
