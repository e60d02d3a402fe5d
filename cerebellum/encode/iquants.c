/* Error feedback in ggml's IQ types: scales stay as an encoder wrote them, codes are chosen anew.
 *
 * A block's bytes are ggml's (ggml-common.h); what a code stands for is in a table that comes from gguf-py. In
 * IQ4_NL and IQ4_XS a code is one of 16 values, a weight at a time. In the others an entry of a grid gives the sizes
 * of 4 or 8 weights, and signs lie beside it: free ones in IQ3_S and IQ2_S, else seven bits for eight weights, whose
 * number of minuses is always even. There eight weights move at once, with the signs that are and with those that
 * would be best if any value were allowed. Of the grid's entries those near these values are tried, by the exact
 * change of (y - x)' M (y - x).
 *
 * Deterministic like kquants.c: loops over `v` are SIMD without a sum across a register, and fmaf is spelt out. */
#include "feedback.h"
#include "halves.h"

#define SUPER 256 /* elements of all blocks but IQ4_NL's */
#define SIGNED 8  /* weights whose signs are one byte */
#define TRIED 16  /* entries of a grid that are tried side by side */
#define EACH_TRIED for (int v = 0; v < TRIED; v++)
#define LEAST_PIVOT 1e-6f /* of a column's own moment: below it the column is the sum of others */
#define LEAST_GAIN 1e-6f /* of the cost's own size: a gain below it may be rounding alone */

enum {
  TYPE_IQ2_XXS = 16,
  TYPE_IQ2_XS = 17,
  TYPE_IQ3_XXS = 18,
  TYPE_IQ4_NL = 20,
  TYPE_IQ3_S = 21,
  TYPE_IQ2_S = 22,
  TYPE_IQ4_XS = 23
};

static uint32_t get_word(const uint8_t *at) {
  return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static void put_word(uint8_t *at, uint32_t word) {
  for (int i = 0; i < 4; i++) at[i] = (uint8_t)(word >> (8 * i));
}

/* ---- IQ4_NL and IQ4_XS: a table of 16 values ----------------------------------------------------------- */

/* What is held of `span` columns of one row while its codes move. */
typedef struct {
  uint8_t *code;
  float *step;      /* a weight is step times the table's value */
  float *gradient;  /* moments times (y - x), of every column */
  float *curvature; /* how much a column's gradient grows when its value does; BIG where the code has to stay */
  int64_t moved;
} Listed;

static void take_iq4_nl(const uint8_t *in, uint8_t *code, float *step) {
  float d = get_half(in);
  for (int i = 0; i < 32; i++) {
    code[i] = (in[2 + i % 16] >> (4 * (i / 16))) & 15;
    step[i] = d;
  }
}

static void take_iq4_xs(const uint8_t *in, uint8_t *code, float *step) {
  float d = get_half(in);
  for (int i = 0; i < SUPER; i++) {
    int j = i / 32, low = (in[4 + j / 2] >> (4 * (j % 2))) & 15, high = (in[2 + j / 4] >> (2 * (j % 4))) & 3;
    code[i] = (in[8 + j * 16 + i % 16] >> (4 * (i % 32 / 16))) & 15;
    step[i] = d * (float)((low | high << 4) - 32);
  }
}

/* Two codes a byte, 16 columns apart: `elements` of them from byte `at` on. */
static void put_pairs(const uint8_t *code, int elements, uint8_t *at) {
  for (int i = 0; i < elements / 2; i++) {
    const uint8_t *first = code + i / 16 * 32 + i % 16;
    at[i] = (uint8_t)(first[0] | first[16] << 4);
  }
}

/* The code whose value is nearest to what the column would be best at, with all others as they are. */
INLINE int nearest_code(const Listed *c, int64_t j, const float *table, const float *between) {
  float wanted = table[c->code[j]] - c->gradient[j] / c->curvature[j];
  int code = 0;
#pragma GCC unroll 15
  for (int k = 0; k < 15; k++) code += wanted > between[k];
  return code;
}

static __attribute__((noinline)) int any_wants(const Listed *c, int64_t first, const float *table,
                                               const float *between) {
  int wants = 0;
  for (int64_t j = first; j < first + SCANNED; j++) wants |= nearest_code(c, j, table, between) != c->code[j];
  return wants;
}

static void move_listed(Listed *c, const float *moments, int64_t span, int64_t first, const float *table,
                        const float *between) {
  for (int64_t j = first; j < first + SCANNED; j++) {
    int code = nearest_code(c, j, table, between);
    if (code == c->code[j]) continue;
    add_scaled(c->gradient, moments + j * span, (table[code] - table[c->code[j]]) * c->step[j], span);
    c->code[j] = (uint8_t)code;
    c->moved++;
  }
}

static void take_listed(int type, const float *table, const float *x, const float *moments, int64_t span,
                        const uint8_t *raw, Listed *c, Errors *error, int r) {
  if (type == TYPE_IQ4_XS)
    for (int64_t j = 0; j < span; j += SUPER) take_iq4_xs(raw + j / SUPER * 136, c->code + j, c->step + j);
  else
    for (int64_t j = 0; j < span; j += 32) take_iq4_nl(raw + j / 32 * 18, c->code + j, c->step + j);
  for (int64_t j = 0; j < span; j++) {
    float own = moments[j * span + j];
    error[j][r] = c->step[j] * table[c->code[j]] - x[j];
    c->curvature[j] = c->step[j] == 0.0f || own <= 0.0f ? BIG : own * c->step[j];
  }
  c->moved = 1;
}

static void put_listed(int type, const Listed *c, int64_t span, uint8_t *raw) {
  if (type == TYPE_IQ4_XS)
    for (int64_t j = 0; j < span; j += SUPER) put_pairs(c->code + j, SUPER, raw + j / SUPER * 136 + 8);
  else
    for (int64_t j = 0; j < span; j += 32) put_pairs(c->code + j, 32, raw + j / 32 * 18 + 2);
}

/* ---- the other types: grids ---------------------------------------------------------------------------- */

/* One super-block: entries of the grid, a byte of signs (bit i: weight i is below zero) and a scale for every 8. */
typedef struct {
  int type, bytes, size, entries; /* size: weights that an entry gives */
  int paired;                     /* the number of minuses in a byte of signs is even */
  void (*take)(const uint8_t *in, uint16_t *entry, uint8_t *sign, float *step);
  void (*put)(const uint16_t *entry, const uint8_t *sign, uint8_t *out);
} Grid;

static int ones(int byte) {
  int count = 0;
  for (int i = 0; i < 8; i++) count += (byte >> i) & 1;
  return count;
}

/* Seven bits of signs; the eighth makes their number even. */
static uint8_t eighth_sign(uint32_t seven) { return (uint8_t)(seven | (uint32_t)(ones((int)seven) & 1) << 7); }

/* Eight words of four times seven bits of signs, and four bits of a scale on top. */
static void take_words(const uint8_t *in, int stride, float d, float unit, uint8_t *sign, float *step) {
  for (int j = 0; j < 8; j++) {
    uint32_t word = get_word(in + j * stride);
    for (int i = 0; i < 4; i++) {
      sign[4 * j + i] = eighth_sign((word >> (7 * i)) & 127u);
      step[4 * j + i] = d * (0.5f + (float)(word >> 28)) * unit;
    }
  }
}

static void put_words(const uint8_t *sign, int stride, uint8_t *out) {
  for (int j = 0; j < 8; j++) {
    uint32_t word = get_word(out + j * stride) & 0xf0000000u;
    for (int i = 0; i < 4; i++) word |= (uint32_t)(sign[4 * j + i] & 127) << (7 * i);
    put_word(out + j * stride, word);
  }
}

static void take_iq2_xxs(const uint8_t *in, uint16_t *entry, uint8_t *sign, float *step) {
  for (int i = 0; i < 32; i++) entry[i] = in[2 + i / 4 * 8 + i % 4];
  take_words(in + 6, 8, get_half(in), 0.25f, sign, step);
}

static void put_iq2_xxs(const uint16_t *entry, const uint8_t *sign, uint8_t *out) {
  for (int i = 0; i < 32; i++) out[2 + i / 4 * 8 + i % 4] = (uint8_t)entry[i];
  put_words(sign, 8, out + 6);
}

static void take_iq3_xxs(const uint8_t *in, uint16_t *entry, uint8_t *sign, float *step) {
  for (int i = 0; i < 64; i++) entry[i] = in[2 + i];
  take_words(in + 66, 4, get_half(in), 0.5f, sign, step);
}

static void put_iq3_xxs(const uint16_t *entry, const uint8_t *sign, uint8_t *out) {
  for (int i = 0; i < 64; i++) out[2 + i] = (uint8_t)entry[i];
  put_words(sign, 4, out + 66);
}

/* Four bits of a scale for 16 weights each, as IQ2_XS and IQ2_S have them. */
static void take_nibbles(const uint8_t *in, float d, float *step) {
  for (int i = 0; i < 32; i++) step[i] = d * (0.5f + (float)((in[i / 4] >> (4 * (i / 2 % 2))) & 15)) * 0.25f;
}

static void take_iq2_xs(const uint8_t *in, uint16_t *entry, uint8_t *sign, float *step) {
  for (int i = 0; i < 32; i++) {
    uint32_t both = (uint32_t)in[2 + 2 * i] | (uint32_t)in[3 + 2 * i] << 8;
    entry[i] = (uint16_t)(both & 511u);
    sign[i] = eighth_sign(both >> 9);
  }
  take_nibbles(in + 66, get_half(in), step);
}

static void put_iq2_xs(const uint16_t *entry, const uint8_t *sign, uint8_t *out) {
  for (int i = 0; i < 32; i++) {
    out[2 + 2 * i] = (uint8_t)entry[i];
    out[3 + 2 * i] = (uint8_t)(entry[i] >> 8 | (sign[i] & 127) << 1);
  }
}

static void take_iq2_s(const uint8_t *in, uint16_t *entry, uint8_t *sign, float *step) {
  for (int i = 0; i < 32; i++) {
    entry[i] = (uint16_t)(in[2 + i] | ((in[66 + i / 4] >> (2 * (i % 4))) & 3) << 8);
    sign[i] = in[34 + i];
  }
  take_nibbles(in + 74, get_half(in), step);
}

static void put_iq2_s(const uint16_t *entry, const uint8_t *sign, uint8_t *out) {
  memset(out + 66, 0, 8);
  for (int i = 0; i < 32; i++) {
    out[2 + i] = (uint8_t)entry[i];
    out[34 + i] = sign[i];
    out[66 + i / 4] |= (uint8_t)(entry[i] >> 8 << (2 * (i % 4)));
  }
}

static void take_iq3_s(const uint8_t *in, uint16_t *entry, uint8_t *sign, float *step) {
  float d = get_half(in);
  for (int i = 0; i < 64; i++) entry[i] = (uint16_t)(in[2 + i] | ((in[66 + i / 8] >> (i % 8)) & 1) << 8);
  for (int i = 0; i < 32; i++) {
    sign[i] = in[74 + i];
    step[i] = d * (float)(1 + 2 * ((in[106 + i / 8] >> (4 * (i / 4 % 2))) & 15));
  }
}

static void put_iq3_s(const uint16_t *entry, const uint8_t *sign, uint8_t *out) {
  memset(out + 66, 0, 8);
  for (int i = 0; i < 64; i++) {
    out[2 + i] = (uint8_t)entry[i];
    out[66 + i / 8] |= (uint8_t)(entry[i] >> 8 << (i % 8));
  }
  for (int i = 0; i < 32; i++) out[74 + i] = sign[i];
}

static const Grid GRIDS[] = {
    {TYPE_IQ2_XXS, 66, 8, 256, 1, take_iq2_xxs, put_iq2_xxs}, {TYPE_IQ2_XS, 74, 8, 512, 1, take_iq2_xs, put_iq2_xs},
    {TYPE_IQ2_S, 82, 8, 1024, 0, take_iq2_s, put_iq2_s},      {TYPE_IQ3_XXS, 98, 4, 256, 1, take_iq3_xxs, put_iq3_xxs},
    {TYPE_IQ3_S, 110, 4, 512, 0, take_iq3_s, put_iq3_s},
};

static const Grid *grid_of(int type) {
  for (size_t i = 0; i < sizeof GRIDS / sizeof *GRIDS; i++)
    if (GRIDS[i].type == type) return &GRIDS[i];
  return NULL;
}

/* What is held of `span` columns of one row while its entries move. */
typedef struct {
  uint16_t *entry;
  uint8_t *sign;
  float *step;     /* of every SIGNED columns */
  float *value;    /* signed sizes of the grid: a weight is step times it */
  float *gradient; /* moments times (y - x), of every column */
  int64_t moved;
} Gridded;

/* The cost of SIGNED neighbours in the unit of their values, all other columns as they are: y' a y + 2 b' y. */
typedef struct {
  float a[SIGNED][SIGNED], b[SIGNED];
  float y[SIGNED];                      /* the values that are */
  float wanted[SIGNED], weight[SIGNED]; /* those that would be best if any were allowed, and what being off costs */
} Local;

/* Values that the neighbours may get: entries, and a byte of signs. */
typedef struct {
  float cost, y[SIGNED];
  uint16_t entry[2];
  uint8_t sign;
} Choice;

static float cost_of(const Local *l, const float *y) {
  float cost = 0.0f;
  for (int i = 0; i < SIGNED; i++) {
    float pull = 2.0f * l->b[i];
    for (int k = 0; k < i; k++) pull = fmaf(2.0f * l->a[i][k], y[k], pull);
    cost = fmaf(y[i], fmaf(l->a[i][i], y[i], pull), cost);
  }
  return cost;
}

/* What an entry is chosen by, for signs that are in the numbers. Its cost is the sum of a_ik y_i y_k over k <= i, and
 * of b_i y_i; how far it is from the wanted values, that of near_i y_i^2 and of pull_i y_i. */
typedef struct {
  float a[SIGNED][SIGNED], b[SIGNED];
  float near[SIGNED], pull[SIGNED];
} Part;

typedef float Tried[TRIED];

/* The nearest entry in each of TRIED lanes: the first entry of the TRIED that it was found among. */
INLINE void find_near(const Part *p, int n, const float *restrict table, int entries, int *restrict at) {
  _Alignas(64) float least[TRIED];
  EACH_TRIED least[v] = BIG;
  EACH_TRIED at[v] = 0;
  for (int first = 0; first < entries; first += TRIED)
    EACH_TRIED {
      float cost = 0.0f;
#pragma GCC unroll 8
      for (int i = 0; i < n; i++) {
        float y = table[i * entries + first + v];
        cost = fmaf(y, fmaf(p->near[i], y, p->pull[i]), cost);
      }
      at[v] = cost < least[v] ? first : at[v];
      least[v] = cost < least[v] ? cost : least[v];
    }
}

KERNEL near_fours(const Part *p, const float *table, int entries, int *at) { find_near(p, 4, table, entries, at); }

KERNEL near_eights(const Part *p, const float *table, int entries, int *at) { find_near(p, 8, table, entries, at); }

/* The cost of TRIED entries, values of one weight after the other. */
INLINE void find_costs(const Part *p, int n, const Tried *restrict y, float *restrict cost) {
  EACH_TRIED {
    float sum = 0.0f;
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
      float pull = p->b[i];
#pragma GCC unroll 8
      for (int k = 0; k <= i; k++) pull = fmaf(p->a[i][k], y[k][v], pull);
      sum = fmaf(y[i][v], pull, sum);
    }
    cost[v] = sum;
  }
}

KERNEL costs_of_fours(const Part *p, const Tried *y, float *cost) { find_costs(p, 4, y, cost); }

KERNEL costs_of_eights(const Part *p, const Tried *y, float *cost) { find_costs(p, 8, y, cost); }

/* The entry with the least cost of the nearest ones, of equal ones the first. */
static int best_entry(const Grid *grid, const Part *p, const float *table) {
  _Alignas(64) int at[TRIED];
  _Alignas(64) Tried cost, y[SIGNED];
  (grid->size == 4 ? near_fours : near_eights)(p, table, grid->entries, at);
  for (int i = 0; i < grid->size; i++, table += grid->entries)
    EACH_TRIED y[i][v] = table[at[v] + v];
  (grid->size == 4 ? costs_of_fours : costs_of_eights)(p, y, cost);
  int best = 0;
  for (int v = 1; v < TRIED; v++)
    if (cost[v] < cost[best] || (cost[v] == cost[best] && at[v] + v < at[best] + best)) best = v;
  return at[best] + best;
}

/* What the neighbours from column j on would cost at other values. The wanted ones are y - (gradient times the
 * inverse of M) / step; being off in one of them, where the others follow, costs by one over the inverse's diagonal. */
static void look_at(const Gridded *c, const float *moments, int64_t span, int64_t j, const float *inverse, Local *l) {
  float step = c->step[j / SIGNED];
  for (int i = 0; i < SIGNED; i++) {
    const float *line = moments + (j + i) * span + j, *own = inverse + i * SIGNED;
    float gradient = c->gradient[j + i], change = 0.0f;
    l->y[i] = c->value[j + i];
    for (int k = 0; k < SIGNED; k++) {
      l->a[i][k] = step * step * line[k];
      gradient = fmaf(-step * c->value[j + k], line[k], gradient);
      change = fmaf(own[k], c->gradient[j + k], change);
    }
    l->b[i] = step * gradient;
    l->wanted[i] = l->y[i] - change / step;
    l->weight[i] = own[i] > 0.0f ? 1.0f / own[i] : 0.0f;
  }
}

/* The best entries with given signs, one after the other where there are two. */
static void try_signs(const Grid *grid, const Local *l, const float *table, int sign, Choice *choice) {
  int n = grid->size;
  float sense[SIGNED], *y = choice->y;
  for (int i = 0; i < SIGNED; i++) {
    sense[i] = (sign >> i) & 1 ? -1.0f : 1.0f;
    y[i] = sense[i] * magnitude(l->y[i]);
  }
  for (int first = 0; first < SIGNED; first += n) {
    Part p;
    for (int i = 0; i < n; i++) {
      const float *a = l->a[first + i] + first;
      float pull = l->b[first + i];
      for (int k = 0; k < SIGNED; k++)
        if (k < first || k >= first + n) pull = fmaf(l->a[first + i][k], y[k], pull);
      p.b[i] = 2.0f * sense[first + i] * pull;
      for (int k = 0; k <= i; k++) p.a[i][k] = (k == i ? 1.0f : 2.0f) * sense[first + i] * sense[first + k] * a[k];
      p.near[i] = l->weight[first + i];
      p.pull[i] = -2.0f * p.near[i] * sense[first + i] * l->wanted[first + i];
    }
    int entry = best_entry(grid, &p, table);
    for (int i = 0; i < n; i++) y[first + i] = sense[first + i] * table[i * grid->entries + entry];
    choice->entry[first / n] = (uint16_t)entry;
  }
  choice->sign = (uint8_t)sign;
  choice->cost = cost_of(l, y);
}

/* The signs of the wanted values. Where the number of minuses has to be even, the one that matters least is turned. */
static int wanted_signs(const Grid *grid, const Local *l) {
  int sign = 0, weakest = 0;
  float least = BIG;
  for (int i = 0; i < SIGNED; i++) {
    float loss = l->weight[i] * l->wanted[i] * l->wanted[i];
    if (l->wanted[i] < 0.0f) sign |= 1 << i;
    if (loss >= least) continue;
    least = loss;
    weakest = i;
  }
  return grid->paired && ones(sign) % 2 ? sign ^ 1 << weakest : sign;
}

/* Moves SIGNED neighbours, with the signs that are and with those that would be best, where that surely gains. */
static void move_gridded(const Grid *grid, Gridded *c, const float *table, const float *moments, int64_t span,
                         int64_t j, const float *inverse) {
  float step = c->step[j / SIGNED];
  if (step == 0.0f) return;
  Local l;
  Choice best, other;
  look_at(c, moments, span, j, inverse, &l);
  int sign = wanted_signs(grid, &l);
  try_signs(grid, &l, table, sign, &best);
  if (sign != c->sign[j / SIGNED]) {
    try_signs(grid, &l, table, c->sign[j / SIGNED], &other);
    if (other.cost < best.cost) best = other;
  }
  float size = 0.0f;
  for (int i = 0; i < SIGNED; i++) size = fmaf(l.a[i][i] * l.y[i], l.y[i], size);
  if (best.cost >= cost_of(&l, l.y) - LEAST_GAIN * size) return;
  for (int i = 0; i < SIGNED; i++) {
    if (best.y[i] == l.y[i]) continue;
    add_scaled(c->gradient, moments + (j + i) * span, (best.y[i] - l.y[i]) * step, span);
    c->value[j + i] = best.y[i];
  }
  for (int i = 0; i < SIGNED / grid->size; i++) c->entry[j / grid->size + i] = best.entry[i];
  c->sign[j / SIGNED] = best.sign;
  c->moved++;
}

/* The inverses of the moments of SIGNED neighbours each, (span / SIGNED, SIGNED, SIGNED), by Gauss and Jordan without
 * pivoting: they only propose. A column without a moment of its own, or that others make up, has zeros. */
static void invert_local(const float *moments, int64_t span, float *inverse) {
  for (int64_t j = 0; j < span; j += SIGNED, inverse += SIGNED * SIGNED) {
    float a[SIGNED][2 * SIGNED] = {{0}};
    for (int i = 0; i < SIGNED; i++) {
      memcpy(a[i], moments + (j + i) * span + j, SIGNED * sizeof(float));
      a[i][SIGNED + i] = 1.0f;
    }
    for (int p = 0; p < SIGNED; p++) {
      float scale = a[p][p] > LEAST_PIVOT * moments[(j + p) * span + j + p] ? 1.0f / a[p][p] : 0.0f;
      for (int k = 0; k < 2 * SIGNED; k++) a[p][k] *= scale;
      for (int i = 0; i < SIGNED; i++) {
        float factor = -a[i][p];
        for (int k = 0; i != p && k < 2 * SIGNED; k++) a[i][k] = fmaf(factor, a[p][k], a[i][k]);
      }
    }
    for (int i = 0; i < SIGNED; i++) memcpy(inverse + i * SIGNED, a[i] + SIGNED, SIGNED * sizeof(float));
  }
}

static void take_gridded(const Grid *grid, const float *table, const float *x, int64_t span, const uint8_t *raw,
                         Gridded *c, Errors *error, int r) {
  int n = grid->size;
  for (int64_t j = 0; j < span; j += SUPER)
    grid->take(raw + j / SUPER * grid->bytes, c->entry + j / n, c->sign + j / SIGNED, c->step + j / SIGNED);
  for (int64_t j = 0; j < span; j++) {
    float size = table[j % n * grid->entries + c->entry[j / n]];
    c->value[j] = (c->sign[j / SIGNED] >> (j % SIGNED)) & 1 ? -size : size;
    error[j][r] = c->step[j / SIGNED] * c->value[j] - x[j];
  }
  c->moved = 1;
}

static void put_gridded(const Grid *grid, const Gridded *c, int64_t span, uint8_t *raw) {
  for (int64_t j = 0; j < span; j += SUPER)
    grid->put(c->entry + j / grid->size, c->sign + j / SIGNED, raw + j / SUPER * grid->bytes);
}

/* ---- what Python calls --------------------------------------------------------------------------------- */

/* Up to FED rows of one span: where they are, and what is held of them. */
typedef struct {
  const Grid *grid; /* NULL: a table of 16 values */
  int type;
  const float *table, *moments;
  int64_t span, sweeps;
  float between[15]; /* where the nearest value of the table changes */
  Listed listed[FED];
  Gridded gridded[FED];
  Errors *error;
  float *inverse; /* of the moments of every SIGNED neighbours */
} Rows;

/* Goes over all columns of some rows; a row that moved nothing the last time is through. */
static int64_t sweep_listed(Rows *rows, int n_rows) {
  int64_t moved = 0;
  int live[FED];
  for (int r = 0; r < n_rows; r++) {
    live[r] = rows->listed[r].moved > 0;
    rows->listed[r].moved = 0;
  }
  for (int64_t j = 0; j < rows->span; j += SCANNED)
    for (int r = 0; r < n_rows; r++)
      if (live[r] && any_wants(rows->listed + r, j, rows->table, rows->between))
        move_listed(rows->listed + r, rows->moments, rows->span, j, rows->table, rows->between);
  for (int r = 0; r < n_rows; r++) moved += rows->listed[r].moved;
  return moved;
}

static int64_t sweep_gridded(Rows *rows, int n_rows) {
  int64_t moved = 0;
  int live[FED];
  for (int r = 0; r < n_rows; r++) {
    live[r] = rows->gridded[r].moved > 0;
    rows->gridded[r].moved = 0;
  }
  for (int64_t j = 0; j < rows->span; j += SIGNED)
    for (int r = 0; r < n_rows; r++)
      if (live[r])
        move_gridded(rows->grid, rows->gridded + r, rows->table, rows->moments, rows->span, j,
                     rows->inverse + j * SIGNED);
  for (int r = 0; r < n_rows; r++) moved += rows->gridded[r].moved;
  return moved;
}

/* Feeds back the errors of up to FED rows, which lie `stride` values and `raw_stride` bytes apart. */
static void feed_back_rows(Rows *rows, int n_rows, const float *x, int64_t stride, uint8_t *raw, int64_t raw_stride) {
  const Grid *grid = rows->grid;
  int64_t span = rows->span, sweeps = rows->sweeps;
  memset(rows->error, 0, (size_t)span * sizeof(Errors));
  for (int r = 0; r < n_rows; r++)
    if (grid)
      take_gridded(grid, rows->table, x + r * stride, span, raw + r * raw_stride, rows->gridded + r, rows->error, r);
    else
      take_listed(rows->type, rows->table, x + r * stride, rows->moments, span, raw + r * raw_stride,
                  rows->listed + r, rows->error, r);
  start_gradients(rows->error, rows->moments, span, grid ? rows->gridded[0].gradient : rows->listed[0].gradient);
  while (sweeps-- > 0 && (grid ? sweep_gridded : sweep_listed)(rows, n_rows) > 0) continue;
  for (int r = 0; r < n_rows; r++)
    if (grid)
      put_gridded(grid, rows->gridded + r, span, raw + r * raw_stride);
    else
      put_listed(rows->type, rows->listed + r, span, raw + r * raw_stride);
}

/* Divides memory among the rows; their gradients lie one after the other. */
static void divide(Rows *rows, float *floats, uint8_t *bytes) {
  int64_t span = rows->span, many = FED * span;
  rows->error = (Errors *)(floats + 3 * many);
  rows->inverse = floats + 4 * many;
  for (int r = 0; r < FED; r++) {
    float *gradient = floats + r * span, *step = gradient + many, *third = step + many;
    uint8_t *codes = bytes + r * span;
    rows->listed[r] = (Listed){.code = codes, .gradient = gradient, .step = step, .curvature = third};
    rows->gridded[r] = (Gridded){.entry = (uint16_t *)codes, /* at most span / 4 of them, then signs */
                                 .sign = codes + span / 2,
                                 .gradient = gradient,
                                 .step = step,
                                 .value = third};
  }
}

/* Error feedback in blocks of an IQ type, as `feed_back` of kquants.c for its own. Table: (16,) values of the codes
 * in IQ4_NL and IQ4_XS, else (weights of an entry, entries). Returns 0, -1 for sizes that do not fit, -2 without
 * memory. */
int feed_back_iq(int type, const float *table, const float *values, const float *moments, int64_t n_rows,
                 int64_t columns, int64_t span, int64_t sweeps, uint8_t *raw) {
  const Grid *grid = grid_of(type);
  int listed = type == TYPE_IQ4_NL || type == TYPE_IQ4_XS, elements = type == TYPE_IQ4_NL ? 32 : SUPER;
  if ((!grid && !listed) || span <= 0 || span % elements || columns % span) return -1;
  int bytes = grid ? grid->bytes : type == TYPE_IQ4_NL ? 18 : 136;
  float *floats = malloc((size_t)span * (4 * FED + SIGNED) * sizeof(float));
  uint8_t *codes = malloc((size_t)span * FED);
  Rows rows = {.grid = grid, .type = type, .table = table, .span = span, .sweeps = sweeps};
  for (int k = 0; listed && k < 15; k++) rows.between[k] = 0.5f * (table[k] + table[k + 1]);
  if (floats && codes) divide(&rows, floats, codes);
  int64_t row_bytes = columns / elements * bytes;
  for (int64_t s = 0; floats && codes && s < columns / span; s++) {
    rows.moments = moments + s * span * span;
    if (grid) invert_local(rows.moments, span, rows.inverse);
    for (int64_t r = 0; r < n_rows; r += FED)
      feed_back_rows(&rows, n_rows - r < FED ? (int)(n_rows - r) : FED, values + r * columns + s * span, columns,
                     raw + r * row_bytes + s * span / elements * bytes, row_bytes);
  }
  free(floats);
  free(codes);
  return floats && codes ? 0 : -2;
}
