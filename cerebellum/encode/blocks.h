/* The bytes of ggml's blocks: what a code, a scale and a minimum become, and what they are read back as.
 *
 * The layouts are ggml's (ggml-common.h); reading back does the same float32 operations in the same order
 * as gguf-py and ggml, so both get the very values that the search believed in. */
#ifndef CEREBELLUM_BLOCKS_H
#define CEREBELLUM_BLOCKS_H

#include "halves.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 256 /* elements of a super-block */
#ifndef LANES
#define LANES 32 /* rows searched side by side: SIMD, and calls paid once for many */
#endif
#define EACH_LANE for (int v = 0; v < LANES; v++)

/* ggml's numbers for its types. */
enum { TYPE_Q8_0 = 8, TYPE_Q2_K = 10, TYPE_Q3_K = 11, TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14 };

/* ---- what the search hands over: one super-block in one lane -------------------------------------- */

typedef struct {
  uint8_t q[BLOCK][LANES]; /* codes of the elements, counted from 0 */
  float scale[16][LANES];  /* codes of the sub-blocks' scales, signed in Q3_K and Q6_K */
  float low[16][LANES];    /* codes of the sub-blocks' minimums: Q2_K, Q4_K, Q5_K */
  float d[LANES], dmin[LANES];
} Found;

/* The bytes of LANES blocks: byte i of lane v at [i][v]. */
typedef uint8_t Packed[210][LANES];

static void pack_half(const float *value, uint8_t (*out)[LANES]) {
  EACH_LANE {
    uint16_t bits = half_bits(value[v]);
    out[0][v] = (uint8_t)(bits & 255u);
    out[1][v] = (uint8_t)(bits >> 8);
  }
}

static void pack_q2_k(const Found *f, Packed out) {
  for (int j = 0; j < 16; j++)
    EACH_LANE out[j][v] = (uint8_t)((int)f->scale[j][v] | ((int)f->low[j][v] << 4));
  for (int i = 0; i < 64; i++) {
    int p = (i / 32) * 128 + i % 32;
    const uint8_t (*q)[LANES] = f->q + p;
    EACH_LANE out[16 + i][v] = (uint8_t)(q[0][v] | (q[32][v] << 2) | (q[64][v] << 4) | (q[96][v] << 6));
  }
  pack_half(f->d, out + 80);
  pack_half(f->dmin, out + 82);
}

static void take_q2_k(const uint8_t *in, int8_t *code, float *step, float *offset) {
  float d = get_half(in + 80), dmin = get_half(in + 82);
  for (int i = 0; i < BLOCK; i++) {
    code[i] = (int8_t)((in[16 + (i / 128) * 32 + i % 32] >> (2 * ((i % 128) / 32))) & 3);
    step[i] = d * (float)(in[i / 16] & 15);
    offset[i] = dmin * (float)(in[i / 16] >> 4);
  }
}

static void put_q2_k(const int8_t *code, uint8_t *out) {
  memset(out + 16, 0, 64);
  for (int i = 0; i < BLOCK; i++)
    out[16 + (i / 128) * 32 + i % 32] |= (uint8_t)(code[i] << (2 * ((i % 128) / 32)));
}

static void pack_q3_k(const Found *f, Packed out) {
  memset(out, 0, 108 * LANES);
  for (int i = 0; i < BLOCK; i++) {
    const uint8_t *q = f->q[i];
    uint8_t *high = out[i % 32], *low = out[32 + (i / 128) * 32 + i % 32];
    int at_high = i / 32, at_low = 2 * ((i % 128) / 32);
    EACH_LANE high[v] |= (uint8_t)((q[v] >> 2) << at_high);
    EACH_LANE low[v] |= (uint8_t)((q[v] & 3) << at_low);
  }
  for (int j = 0; j < 16; j++)
    EACH_LANE {
      int code = (int)f->scale[j][v] + 32;
      out[96 + j % 8][v] |= (uint8_t)((code & 15) << (4 * (j / 8)));
      out[104 + j % 4][v] |= (uint8_t)((code >> 4) << (2 * (j / 4)));
    }
  pack_half(f->d, out + 108);
}

static void take_q3_k(const uint8_t *in, int8_t *code, float *step, float *offset) {
  float d = get_half(in + 108);
  for (int i = 0; i < BLOCK; i++) {
    int j = i / 16;
    int scale = ((in[96 + j % 8] >> (4 * (j / 8))) & 15) | (((in[104 + j % 4] >> (2 * (j / 4))) & 3) << 4);
    int low = (in[32 + (i / 128) * 32 + i % 32] >> (2 * ((i % 128) / 32))) & 3;
    code[i] = (int8_t)(low - ((in[i % 32] >> (i / 32)) & 1 ? 0 : 4));
    step[i] = d * (float)(scale - 32);
    offset[i] = 0.0f;
  }
}

static void put_q3_k(const int8_t *code, uint8_t *out) {
  memset(out, 0, 96);
  for (int i = 0; i < BLOCK; i++) {
    out[i % 32] |= (uint8_t)(((code[i] + 4) >> 2) << (i / 32));
    out[32 + (i / 128) * 32 + i % 32] |= (uint8_t)(((code[i] + 4) & 3) << (2 * ((i % 128) / 32)));
  }
}

/* Eight pairs of 6-bit scales and minimums in twelve bytes, as Q4_K and Q5_K have them. */
static void pack_pairs(const Found *f, uint8_t (*out)[LANES]) {
  for (int j = 0; j < 4; j++)
    EACH_LANE {
      int s = (int)f->scale[j + 4][v], m = (int)f->low[j + 4][v];
      out[j][v] = (uint8_t)((int)f->scale[j][v] | ((s >> 4) << 6));
      out[4 + j][v] = (uint8_t)((int)f->low[j][v] | ((m >> 4) << 6));
      out[8 + j][v] = (uint8_t)((s & 15) | ((m & 15) << 4));
    }
}

static void read_pair(const uint8_t *in, int j, int *scale, int *low) {
  if (j < 4) {
    *scale = in[j] & 63;
    *low = in[4 + j] & 63;
  } else {
    *scale = (in[4 + j] & 15) | ((in[j - 4] >> 6) << 4);
    *low = (in[4 + j] >> 4) | ((in[j] >> 6) << 4);
  }
}

/* d, dmin, the pairs, then from byte `at` on two codes' low four bits a byte. */
static void pack_ranged(const Found *f, int at, Packed out) {
  pack_half(f->d, out);
  pack_half(f->dmin, out + 2);
  pack_pairs(f, out + 4);
  for (int i = 0; i < 128; i++) {
    const uint8_t (*q)[LANES] = f->q + (i / 32) * 64 + i % 32;
    EACH_LANE out[at + i][v] = (uint8_t)((q[0][v] & 15) | ((q[32][v] & 15) << 4));
  }
}

static void pack_q4_k(const Found *f, Packed out) { pack_ranged(f, 16, out); }

static void pack_q5_k(const Found *f, Packed out) {
  pack_ranged(f, 48, out);
  memset(out[16], 0, 32 * LANES);
  for (int i = 0; i < BLOCK; i++) {
    int at = i / 32;
    EACH_LANE out[16 + i % 32][v] |= (uint8_t)((f->q[i][v] >> 4) << at);
  }
}

/* Q4_K, and with `high` bits Q5_K. */
static void take_pairs(const uint8_t *in, const uint8_t *high, const uint8_t *low_bits, int8_t *code,
                       float *step, float *offset) {
  float d = get_half(in), dmin = get_half(in + 2);
  for (int i = 0; i < BLOCK; i++) {
    int j = i / 32, scale, low;
    read_pair(in + 4, j, &scale, &low);
    code[i] = (int8_t)((low_bits[(j / 2) * 32 + i % 32] >> (4 * (j % 2))) & 15);
    if (high) code[i] = (int8_t)(code[i] | (((high[i % 32] >> j) & 1) << 4));
    step[i] = d * (float)scale;
    offset[i] = dmin * (float)low;
  }
}

static void take_q4_k(const uint8_t *in, int8_t *code, float *step, float *offset) {
  take_pairs(in, NULL, in + 16, code, step, offset);
}

static void put_q4_k(const int8_t *code, uint8_t *out) {
  memset(out + 16, 0, 128);
  for (int i = 0; i < BLOCK; i++)
    out[16 + (i / 64) * 32 + i % 32] |= (uint8_t)(code[i] << (4 * ((i / 32) % 2)));
}

static void take_q5_k(const uint8_t *in, int8_t *code, float *step, float *offset) {
  take_pairs(in, in + 16, in + 48, code, step, offset);
}

static void put_q5_k(const int8_t *code, uint8_t *out) {
  memset(out + 16, 0, 160);
  for (int i = 0; i < BLOCK; i++) {
    out[16 + i % 32] |= (uint8_t)((code[i] >> 4) << (i / 32));
    out[48 + (i / 64) * 32 + i % 32] |= (uint8_t)((code[i] & 15) << (4 * ((i / 32) % 2)));
  }
}

static void pack_q6_k(const Found *f, Packed out) {
  memset(out, 0, 208 * LANES);
  for (int i = 0; i < BLOCK; i++) {
    int half = i / 128, part = (i % 128) / 32, m = i % 32, at_low = 4 * (part / 2), at_high = 2 * part;
    uint8_t *low = out[half * 64 + (part % 2) * 32 + m], *high = out[128 + half * 32 + m];
    EACH_LANE low[v] |= (uint8_t)((f->q[i][v] & 15) << at_low);
    EACH_LANE high[v] |= (uint8_t)((f->q[i][v] >> 4) << at_high);
  }
  for (int j = 0; j < 16; j++)
    EACH_LANE out[192 + j][v] = (uint8_t)((int)f->scale[j][v] & 255);
  pack_half(f->d, out + 208);
}

static void take_q6_k(const uint8_t *in, int8_t *code, float *step, float *offset) {
  float d = get_half(in + 208);
  for (int i = 0; i < BLOCK; i++) {
    int half = i / 128, part = (i % 128) / 32, m = i % 32;
    int low = (in[half * 64 + (part % 2) * 32 + m] >> (4 * (part / 2))) & 15;
    int high = (in[128 + half * 32 + m] >> (2 * part)) & 3;
    code[i] = (int8_t)((low | (high << 4)) - 32);
    step[i] = d * (float)(int8_t)in[192 + i / 16];
    offset[i] = 0.0f;
  }
}

static void put_q6_k(const int8_t *code, uint8_t *out) {
  memset(out, 0, 192);
  for (int i = 0; i < BLOCK; i++) {
    int half = i / 128, part = (i % 128) / 32, m = i % 32, from_zero = code[i] + 32;
    out[half * 64 + (part % 2) * 32 + m] |= (uint8_t)((from_zero & 15) << (4 * (part / 2)));
    out[128 + half * 32 + m] |= (uint8_t)((from_zero >> 4) << (2 * part));
  }
}

/* Codes 0 to 254 stand for -127 to 127. */
static void pack_q8_0(const Found *f, Packed out) {
  pack_half(f->d, out);
  for (int i = 0; i < 32; i++)
    EACH_LANE out[2 + i][v] = (uint8_t)(f->q[i][v] - 127);
}

static void take_q8_0(const uint8_t *in, int8_t *code, float *step, float *offset) {
  float d = get_half(in);
  for (int i = 0; i < 32; i++) {
    code[i] = (int8_t)in[2 + i];
    step[i] = d;
    offset[i] = 0.0f;
  }
}

static void put_q8_0(const int8_t *code, uint8_t *out) {
  for (int i = 0; i < 32; i++) out[2 + i] = (uint8_t)code[i];
}

/* One row a type: sizes, the range of its codes, and how its blocks are written and read. */
typedef struct {
  int type, elements, bytes;
  int low, high;
  void (*pack)(const Found *, Packed out);
  void (*take)(const uint8_t *in, int8_t *code, float *step, float *offset); /* value = step * code - offset */
  void (*put)(const int8_t *code, uint8_t *out);                             /* other codes, scales kept */
} Layout;

static const Layout LAYOUTS[] = {
    {TYPE_Q2_K, 256, 84, 0, 3, pack_q2_k, take_q2_k, put_q2_k},
    {TYPE_Q3_K, 256, 110, -4, 3, pack_q3_k, take_q3_k, put_q3_k},
    {TYPE_Q4_K, 256, 144, 0, 15, pack_q4_k, take_q4_k, put_q4_k},
    {TYPE_Q5_K, 256, 176, 0, 31, pack_q5_k, take_q5_k, put_q5_k},
    {TYPE_Q6_K, 256, 210, -32, 31, pack_q6_k, take_q6_k, put_q6_k},
    {TYPE_Q8_0, 32, 34, -127, 127, pack_q8_0, take_q8_0, put_q8_0},
};

static const Layout *layout_of(int type) {
  for (size_t i = 0; i < sizeof LAYOUTS / sizeof *LAYOUTS; i++)
    if (LAYOUTS[i].type == type) return &LAYOUTS[i];
  return NULL;
}

#endif
