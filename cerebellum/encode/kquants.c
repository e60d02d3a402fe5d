/* Encoders for Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and Q8_0: a wider search than ggml's, LANES blocks at a time.
 *
 * Every loop over `v` runs over LANES blocks side by side, so a compiler turns it into SIMD without a
 * single sum across a register, and the bytes do not depend on how wide a register is. Blocks are searched
 * at a scale of their own (a power of two, exact), so neither tiny nor huge weights leave float32's range.
 *
 * Deterministic: only + - * /, fmaf and sqrtf, which IEEE 754 fixes to the last bit, in an order that the C
 * standard fixes as long as the compiler may neither reassociate nor contract (-ffp-contract=off, never
 * -ffast-math); halves are rounded in integer code. library.py says how that is checked.
 *
 * KERNELs are kept out of line: inlined, gcc forgets `restrict` and with it most of the SIMD. */
#include "blocks.h"
#include "feedback.h"

#include <math.h>
#include <stdlib.h>

#define TINY 1e-30f
#define LEAST_UNIT 2.3283064365386963e-10f /* 2^-32: the smallest fp16 is 2^-24 */
#define PARALLEL 1e-6f                     /* of the product of the diagonal: below it two unknowns are one */

typedef float Lanes[LANES];
typedef Lanes Subs[16]; /* something of every sub-block */

/* LANES blocks of values and weights, each in units of its own. */
typedef struct {
  _Alignas(64) Lanes x[BLOCK];
  _Alignas(64) Lanes w[BLOCK];
  _Alignas(64) Lanes unit; /* a power of two: x times unit is the true value */
} Tile;

/* 0 where a scale is too small to matter beside values of about 1: x * inverse stays below 2^22. */
INLINE float inverse(float a) {
  float safe = magnitude(a) > 1e-6f ? a : 1.0f, r = 1.0f / safe;
  return magnitude(a) > 1e-6f ? r : 0.0f;
}
/* The code of a value: x * inv to the nearest integer in one rounding, then kept within the type's range. */
INLINE float code_of(float x, float inv, float low, float high) {
  return within(fmaf(x, inv, MAGIC) - MAGIC, low, high);
}
INLINE float shifted_code(float x, float inv, float shift, float high) {
  return within(nearest(fmaf(x, inv, shift)), 0.0f, high);
}

/* The greatest power of two not above a, kept where it has an exact inverse. */
INLINE float power_of_two(float a, float least) {
  float kept = within(a, least, 1e36f);
  uint32_t u;
  memcpy(&u, &kept, 4);
  u &= 0x7f800000u;
  memcpy(&kept, &u, 4);
  return kept;
}

/* The fp16 nearest to d in true units, but never zero for a d that is not. In ordinary models the d of
 * Q5_K and Q6_K are subnormal halves, whole percents apart, so no d is judged before it is rounded. */
KERNEL round_to_half(float *restrict d, const float *restrict unit) {
  EACH_LANE {
    float exact = d[v] * unit[v], size = magnitude(exact), normal;
    /* 0.5 has 2^-24 for a last bit, which is the step of subnormal halves */
    float tiny = larger((size + 0.5f) - 0.5f, exact != 0.0f ? HALF_LEAST : 0.0f);
    uint32_t a;
    memcpy(&a, &size, 4);
    a = (a + 0xfffu + ((a >> 13) & 1u)) & ~0x1fffu;
    memcpy(&normal, &a, 4);
    float half = size < 6.103515625e-5f ? tiny : smaller(normal, 65504.0f);
    d[v] = (exact < 0.0f ? -half : half) / unit[v];
  }
}

/* ---- loading: lanes are rows, so that all of them share their columns' importance ------------------- */

/* Importance of n columns in units of their own (a power of two), all ones without any. What nothing was
 * seen to use keeps a trace, so that it still gets its best code; where that holds for all, all count. */
static void prepare_importance(const float *importance, int n, float *q) {
  float most = 0.0f;
  for (int i = 0; i < n; i++) {
    q[i] = importance ? importance[i] : 1.0f;
    most = larger(most, q[i]);
  }
  float share = most > 0.0f ? 1.0f / power_of_two(most, 1e-36f) : 0.0f, trace = most > 0.0f ? 1e-7f : 1.0f;
  for (int i = 0; i < n; i++) q[i] = larger(q[i] * share, trace);
}

/* A cache line of every lane's row at a time: rows often lie a power of two apart. */
KERNEL gather(Lanes *restrict x, int n, const float *const *rows) {
  for (int first = 0; first < n; first += 16)
    EACH_LANE
      for (int i = first; i < first + 16; i++) x[i][v] = rows[v][i];
}

KERNEL normalise(Lanes *restrict x, int n, float *restrict unit, float *restrict spread) {
  Lanes most = {0}, sum = {0}, inverse_unit;
  for (int i = 0; i < n; i++)
    EACH_LANE most[v] = larger(most[v], magnitude(x[i][v]));
  EACH_LANE {
    unit[v] = most[v] > 0.0f ? power_of_two(most[v], LEAST_UNIT) : 1.0f;
    inverse_unit[v] = 1.0f / unit[v];
  }
  for (int i = 0; i < n; i++)
    EACH_LANE {
      x[i][v] *= inverse_unit[v];
      sum[v] += x[i][v] * x[i][v];
    }
  EACH_LANE spread[v] = sum[v] / (float)n;
}

/* How much an error counts: importance * (sigma * mean square + x^2)^(1/2), or by importance alone where
 * sigma is 0. The form and its sigma are ggml's (quantize_row_q*_K_impl). */
KERNEL weigh(const Lanes *restrict x, Lanes *restrict w, int n, const float *restrict q,
             const float *restrict spread, float sigma) {
  if (sigma > 0.0f)
    for (int i = 0; i < n; i++)
      EACH_LANE w[i][v] = q[i] * sqrtf(sigma * spread[v] + x[i][v] * x[i][v]);
  else
    for (int i = 0; i < n; i++)
      EACH_LANE w[i][v] = q[i];
}

/* ---- symmetric types: x ~ d * code * l, Q3_K, Q6_K (and Q8_0, whose code is 1) ------------------------ */

typedef struct {
  float low, high;           /* of l */
  float code_low, code_high; /* of the sub-blocks' scales */
  const float *starts;       /* the largest value of a sub-block is put at these l */
  int n_starts, refits;
  float step; /* of the largest scale, put at code_low, code_low + step, ... and mirrored */
  int n_steps, candidates, rounds;
} Symmetric;

/* What a sub-block's fit needs of its values: sum w x l and sum w l^2. */
typedef struct {
  Subs xl, ll;
} Moments;

INLINE void moments(const Lanes *restrict x, const Lanes *restrict w, int n, const float *restrict inv,
                    float low, float high, float *restrict xl, float *restrict ll) {
  EACH_LANE {
    float a = 0.0f, b = 0.0f;
#pragma GCC unroll 32
    for (int i = 0; i < n; i++) {
      float l = code_of(x[i][v], inv[v], low, high), t = w[i][v] * l;
      a = fmaf(t, x[i][v], a);
      b = fmaf(t, l, b);
    }
    xl[v] = a;
    ll[v] = b;
  }
}

KERNEL moments_16(const Lanes *x, const Lanes *w, const float *inv, float low, float high, float *xl,
                  float *ll) {
  moments(x, w, 16, inv, low, high, xl, ll);
}

KERNEL moments_32(const Lanes *x, const Lanes *w, const float *inv, float low, float high, float *xl,
                  float *ll) {
  moments(x, w, 32, inv, low, high, xl, ll);
}

/* The sub-blocks' best scales on their own: gain = how much of sum w x^2 the fit explains. */
typedef struct {
  Subs scale, ll, gain;
} Alone;

KERNEL keep_better(const float *restrict xl, const float *restrict ll, float *restrict scale,
                   float *restrict best_ll, float *restrict gain) {
  EACH_LANE {
    float s = xl[v] / (ll[v] + TINY), g = s * xl[v];
    int better = g > gain[v];
    scale[v] = better ? s : scale[v];
    best_ll[v] = better ? ll[v] : best_ll[v];
    gain[v] = better ? g : gain[v];
  }
}

INLINE void try_inverse(const Lanes *x, const Lanes *w, int n, const float *inv, const Symmetric *p, Alone *a,
                        int j) {
  Lanes xl, ll;
  (n == 16 ? moments_16 : moments_32)(x, w, inv, p->low, p->high, xl, ll);
  keep_better(xl, ll, a->scale[j], a->ll[j], a->gain[j]);
}

/* The value farthest from zero, with its sign. */
KERNEL farthest(const Lanes *restrict of, int n, float *restrict most) {
  EACH_LANE most[v] = 0.0f;
  for (int i = 0; i < n; i++)
    EACH_LANE most[v] = magnitude(of[i][v]) > magnitude(most[v]) ? of[i][v] : most[v];
}

KERNEL invert(const float *restrict a, float *restrict inv) {
  EACH_LANE inv[v] = inverse(a[v]);
}

KERNEL invert_product(const float *restrict a, const float *restrict b, float *restrict inv) {
  EACH_LANE inv[v] = inverse(a[v] * b[v]);
}

KERNEL scale_by(const float *restrict a, float factor, float *restrict out) {
  EACH_LANE out[v] = a[v] * factor;
}

INLINE void fit_alone(const Tile *t, const Symmetric *p, int n, int j, Alone *a) {
  const Lanes *x = t->x + n * j, *w = t->w + n * j;
  Lanes most, inverse_most, inv;
  farthest(x, n, most);
  invert(most, inverse_most);
  EACH_LANE a->scale[j][v] = a->ll[j][v] = a->gain[j][v] = 0.0f;
  for (int k = 0; k < p->n_starts; k++) {
    scale_by(inverse_most, p->starts[k], inv);
    try_inverse(x, w, n, inv, p, a, j);
  }
  for (int k = 0; k < p->refits; k++) {
    invert(a->scale[j], inv);
    try_inverse(x, w, n, inv, p, a, j);
  }
}

/* The two best d of many, by a model of the total error that looks at no value again. */
#define CANDIDATES 2
typedef struct {
  Lanes d[CANDIDATES], error[CANDIDATES];
} Shortlist;

static void clear(Shortlist *s) {
  for (int k = 0; k < CANDIDATES; k++)
    EACH_LANE {
      s->d[k][v] = 0.0f;
      s->error[k][v] = BIG;
    }
}

KERNEL insert(Shortlist *restrict s, const float *restrict d, const float *restrict error) {
  EACH_LANE {
    float first = s->error[0][v], second = s->error[1][v], d_first = s->d[0][v], d_second = s->d[1][v];
    int best = error[v] < first, good = error[v] < second;
    s->error[1][v] = best ? first : good ? error[v] : second;
    s->d[1][v] = best ? d_first : good ? d[v] : d_second;
    s->error[0][v] = best ? error[v] : first;
    s->d[0][v] = best ? d[v] : d_first;
  }
}

/* Adds what is lost where a wanted value becomes a multiple of d, each with its curvature. */
KERNEL add_loss(const float *restrict wanted, const float *restrict curvature, const float *restrict d,
                const float *restrict inv, float low, float high, float *restrict error) {
  EACH_LANE {
    float r = wanted[v] - d[v] * nearest(within(wanted[v] * inv[v], low, high));
    error[v] += curvature[v] * r * r;
  }
}

/* Tries the d that puts `most`, the largest of the wanted values, at `code`. */
static void propose(int subs, const Subs wanted, const Subs curvature, const Lanes most, const Lanes unit,
                    float code, float low, float high, Shortlist *s) {
  Lanes d, inv, error = {0};
  scale_by(most, 1.0f / code, d);
  round_to_half(d, unit);
  invert(d, inv);
  for (int j = 0; j < subs; j++) add_loss(wanted[j], curvature[j], d, inv, low, high, error);
  insert(s, d, error);
}

KERNEL round_codes(const float *restrict wanted, const float *restrict inv, float low, float high,
                   float *restrict codes) {
  EACH_LANE codes[v] = nearest(within(wanted[v] * inv[v], low, high));
}

static void codes_at(int subs, const Subs wanted, const Lanes d, float low, float high, Subs codes) {
  Lanes inv;
  invert(d, inv);
  for (int j = 0; j < subs; j++) round_codes(wanted[j], inv, low, high, codes[j]);
}

static void shortlist(const Symmetric *p, const Alone *a, const Lanes unit, Shortlist *s) {
  Lanes most;
  farthest(a->scale, 16, most);
  clear(s);
  for (int k = 0; k < p->n_steps; k++) {
    float step = (float)k * p->step;
    propose(16, a->scale, a->ll, most, unit, p->code_low + step, p->code_low, p->code_high, s);
    propose(16, a->scale, a->ll, most, unit, p->code_high - step, p->code_low, p->code_high, s);
  }
}

KERNEL keep_code(const float *restrict d, const float *restrict code, const float *restrict xl,
                 const float *restrict ll, float *restrict least, float *restrict best,
                 float *restrict best_xl, float *restrict best_ll) {
  EACH_LANE {
    float scale = d[v] * code[v], error = scale * (scale * ll[v] - 2.0f * xl[v]);
    int better = error < least[v];
    least[v] = better ? error : least[v];
    best[v] = better ? code[v] : best[v];
    best_xl[v] = better ? xl[v] : best_xl[v];
    best_ll[v] = better ? ll[v] : best_ll[v];
  }
}

KERNEL step_codes(const float *restrict centre, float r, float low, float high, float *restrict code) {
  EACH_LANE code[v] = within(centre[v] + r, low, high);
}

/* The best of three neighbouring codes for a sub-block's scale, by its true error at d. */
static void choose_code(const Lanes *x, const Lanes *w, const Symmetric *p, const Lanes d, const Lanes centre,
                        Lanes best, Lanes best_xl, Lanes best_ll) {
  Lanes least, code, inv, xl, ll;
  EACH_LANE least[v] = BIG;
  for (int r = -1; r <= 1; r++) {
    step_codes(centre, (float)r, p->code_low, p->code_high, code);
    invert_product(d, code, inv);
    moments_16(x, w, inv, p->low, p->high, xl, ll);
    keep_code(d, code, xl, ll, least, best, best_xl, best_ll);
  }
}

typedef int Mask[LANES];

KERNEL keep_where(const int *restrict better, const float *restrict candidate, float *restrict best) {
  EACH_LANE best[v] = better[v] ? candidate[v] : best[v];
}

KERNEL add_moments(const float *restrict code, const float *restrict xl, const float *restrict ll,
                   float *restrict sum_xl, float *restrict sum_ll) {
  EACH_LANE {
    sum_xl[v] += code[v] * xl[v];
    sum_ll[v] += code[v] * code[v] * ll[v];
  }
}

/* The d that fits all codes best, and the block if it is the best so far. */
static void settle(const Subs code, const Moments *m, const Lanes unit, Lanes d, Lanes least, Found *found) {
  Lanes xl = {0}, ll = {0};
  for (int j = 0; j < 16; j++) add_moments(code[j], m->xl[j], m->ll[j], xl, ll);
  EACH_LANE d[v] = xl[v] / (ll[v] + TINY);
  round_to_half(d, unit);
  Mask better;
  EACH_LANE {
    float error = d[v] * (d[v] * ll[v] - 2.0f * xl[v]);
    better[v] = error < least[v];
    least[v] = better[v] ? error : least[v];
  }
  keep_where(better, d, found->d);
  for (int j = 0; j < 16; j++) keep_where(better, code[j], found->scale[j]);
}

KERNEL store_codes(const Lanes *restrict x, int n, const float *restrict inv, float low, float high,
                   uint8_t (*restrict q)[LANES]) {
  for (int i = 0; i < n; i++)
    EACH_LANE q[i][v] = (uint8_t)(int)(code_of(x[i][v], inv[v], low, high) - low);
}

static void search_symmetric(const Tile *t, const Symmetric *p, Found *found) {
  Alone alone;
  Shortlist list;
  Lanes d, least;
  for (int j = 0; j < 16; j++) fit_alone(t, p, 16, j, &alone);
  shortlist(p, &alone, t->unit, &list);
  EACH_LANE least[v] = 0.0f; /* what all zeros would leave */
  memset(found, 0, sizeof *found);
  for (int k = 0; k < p->candidates; k++) {
    Subs centre, code;
    Moments m;
    EACH_LANE d[v] = list.d[k][v];
    codes_at(16, alone.scale, d, p->code_low, p->code_high, code);
    for (int round = 0; round < p->rounds; round++) {
      memcpy(centre, code, sizeof centre);
      for (int j = 0; j < 16; j++)
        choose_code(t->x + 16 * j, t->w + 16 * j, p, d, centre[j], code[j], m.xl[j], m.ll[j]);
      settle(code, &m, t->unit, d, least, found);
    }
  }
  for (int j = 0; j < 16; j++) {
    invert_product(found->d, found->scale[j], d);
    store_codes(t->x + 16 * j, 16, d, p->low, p->high, found->q + 16 * j);
  }
}

/* One scale of its own for 32 values: no codes to choose. */
static void search_q8_0(const Tile *t, const Symmetric *p, Found *found) {
  Alone alone;
  fit_alone(t, p, 32, 0, &alone);
  EACH_LANE found->d[v] = magnitude(alone.scale[0][v]);
  round_to_half(found->d, t->unit);
  Lanes inv;
  EACH_LANE inv[v] = inverse(found->d[v]);
  store_codes(t->x, 32, inv, p->low, p->high, found->q);
}

/* ---- types with a minimum: x ~ d * scale * l - dmin * low, Q2_K, Q4_K, Q5_K ----------------------------- */

typedef struct {
  int subs;             /* sub-blocks of a block */
  float high;           /* of l, from 0 */
  float code_high;      /* of scales and minimums, from 0 */
  const float *margins; /* shares of the range cut off below and above: every pair is a start */
  int n_margins, refits;
  float step; /* the largest scale, or minimum, is put at code_high, code_high - step, ... */
  int n_steps, candidates, rounds, reach; /* reach: scale codes tried on either side */
} Ranged;

/* Of every sub-block on its own: sum w, sum w x, its range, and the best fit x ~ scale * l - low. */
typedef struct {
  Subs w, wx, least, most;
  Subs scale, low, l, ll, error; /* l, ll: sum w l, sum w l^2 */
} Fits;

/* What a choice of codes was worth, for the d and dmin that fit all of it best. */
typedef struct {
  Subs scale, low, l, ll, xl;
} Chosen;

INLINE void ranged_moments(const Lanes *restrict x, const Lanes *restrict w, int n, const float *restrict inv,
                           const float *restrict shift, float high, float *restrict l_, float *restrict ll_,
                           float *restrict xl_) {
  EACH_LANE {
    float a = 0.0f, b = 0.0f, c = 0.0f;
#pragma GCC unroll 32
    for (int i = 0; i < n; i++) {
      float l = shifted_code(x[i][v], inv[v], shift[v], high), t = w[i][v] * l;
      a += t;
      b = fmaf(t, l, b);
      c = fmaf(t, x[i][v], c);
    }
    l_[v] = a;
    ll_[v] = b;
    xl_[v] = c;
  }
}

KERNEL ranged_moments_16(const Lanes *x, const Lanes *w, const float *inv, const float *shift, float high,
                         float *l, float *ll, float *xl) {
  ranged_moments(x, w, 16, inv, shift, high, l, ll, xl);
}

KERNEL ranged_moments_32(const Lanes *x, const Lanes *w, const float *inv, const float *shift, float high,
                         float *l, float *ll, float *xl) {
  ranged_moments(x, w, 32, inv, shift, high, l, ll, xl);
}

/* sum w (x - scale l + low)^2 less sum w x^2. */
INLINE float ranged_error(float scale, float low, float w, float wx, float l, float ll, float xl) {
  return low * (2.0f * wx + low * w) + scale * (scale * ll - 2.0f * (xl + low * l));
}

/* Weighted least squares for scale and low, neither below zero. */
INLINE void solve_pair(float w, float wx, float l, float ll, float xl, float *scale, float *low) {
  float det = w * ll - l * l;
  int apart = det > w * ll * PARALLEL;
  float inv = 1.0f / (apart ? det : 1.0f);
  float s = (w * xl - wx * l) * inv, m = (l * xl - ll * wx) * inv;
  int both = apart & (m > 0.0f);
  float alone = xl / (ll + TINY), constant = larger(-wx / (w + TINY), 0.0f);
  *scale = larger(both ? s : alone, 0.0f);
  *low = both ? m : ll > TINY ? 0.0f : constant;
}

KERNEL keep_better_pair(const float *restrict w, const float *restrict wx, const float *restrict l,
                        const float *restrict ll, const float *restrict xl, float *restrict best_scale,
                        float *restrict best_low, float *restrict best_l, float *restrict best_ll,
                        float *restrict least) {
  EACH_LANE {
    float scale, low;
    solve_pair(w[v], wx[v], l[v], ll[v], xl[v], &scale, &low);
    float error = ranged_error(scale, low, w[v], wx[v], l[v], ll[v], xl[v]);
    int better = error < least[v];
    best_scale[v] = better ? scale : best_scale[v];
    best_low[v] = better ? low : best_low[v];
    best_l[v] = better ? l[v] : best_l[v];
    best_ll[v] = better ? ll[v] : best_ll[v];
    least[v] = better ? error : least[v];
  }
}

INLINE void try_pair(const Lanes *x, const Lanes *w, int n, float high, const float *inv, const float *shift,
                     Fits *f, int j) {
  Lanes l, ll, xl;
  (n == 16 ? ranged_moments_16 : ranged_moments_32)(x, w, inv, shift, high, l, ll, xl);
  keep_better_pair(f->w[j], f->wx[j], l, ll, xl, f->scale[j], f->low[j], f->l[j], f->ll[j], f->error[j]);
}

KERNEL survey(const Lanes *restrict x, const Lanes *restrict w, int n, Fits *restrict f, int j) {
  Lanes sum_w = {0}, sum_wx = {0}, least = {0}, most;
  EACH_LANE most[v] = x[0][v];
  for (int i = 0; i < n; i++)
    EACH_LANE {
      sum_w[v] += w[i][v];
      sum_wx[v] += w[i][v] * x[i][v];
      least[v] = smaller(least[v], x[i][v]);
      most[v] = larger(most[v], x[i][v]);
    }
  EACH_LANE {
    f->w[j][v] = sum_w[v];
    f->wx[j][v] = sum_wx[v];
    f->least[j][v] = least[v];
    f->most[j][v] = most[v];
    f->scale[j][v] = f->low[j][v] = f->l[j][v] = f->ll[j][v] = 0.0f;
    f->error[j][v] = BIG;
  }
}

/* The range without its margins, put at the codes 0 to high. */
KERNEL stretch(const float *restrict least, const float *restrict most, float margin, float kept, float high,
               float *restrict inv, float *restrict shift) {
  EACH_LANE {
    float range = most[v] - least[v];
    inv[v] = high * inverse(range * kept);
    shift[v] = -(least[v] + margin * range) * inv[v];
  }
}

KERNEL multiply(const float *restrict a, const float *restrict b, float *restrict out) {
  EACH_LANE out[v] = a[v] * b[v];
}

INLINE void fit_pair(const Tile *t, const Ranged *p, int n, int j, Fits *f) {
  const Lanes *x = t->x + n * j, *w = t->w + n * j;
  Lanes inv, shift;
  survey(x, w, n, f, j);
  for (int below = 0; below < p->n_margins; below++)
    for (int above = 0; above < p->n_margins; above++) {
      float a = p->margins[below], kept = 1.0f - a - p->margins[above];
      stretch(f->least[j], f->most[j], a, kept, p->high, inv, shift);
      try_pair(x, w, n, p->high, inv, shift, f, j);
    }
  for (int k = 0; k < p->refits; k++) {
    invert(f->scale[j], inv);
    multiply(f->low[j], inv, shift);
    try_pair(x, w, n, p->high, inv, shift, f, j);
  }
}

/* Two d, each the best by a model of the error: every minimum free to follow its scale, or none. */
static void shortlist_scales(const Ranged *p, const Fits *f, const Lanes unit, Shortlist *s) {
  Subs curvature;
  Shortlist following, staying;
  Lanes most;
  for (int j = 0; j < p->subs; j++)
    EACH_LANE curvature[j][v] = f->ll[j][v] - f->l[j][v] * f->l[j][v] / (f->w[j][v] + TINY);
  farthest(f->scale, p->subs, most);
  clear(&following);
  clear(&staying);
  for (int k = 0; k < p->n_steps; k++) {
    float code = p->code_high - (float)k * p->step;
    propose(p->subs, f->scale, curvature, most, unit, code, 0.0f, p->code_high, &following);
    propose(p->subs, f->scale, f->ll, most, unit, code, 0.0f, p->code_high, &staying);
  }
  memcpy(s->d[0], following.d[0], sizeof(Lanes));
  EACH_LANE s->d[1][v] = staying.d[0][v] == following.d[0][v] ? following.d[1][v] : staying.d[0][v];
}

/* Codes of the scales at d; the minimums that go best with them, and a dmin for those. */
static void first_codes(const Ranged *p, const Fits *f, const Lanes unit, const Lanes d, Lanes dmin,
                        Subs scale, Subs low) {
  Subs wanted;
  Shortlist s;
  Lanes most;
  codes_at(p->subs, f->scale, d, 0.0f, p->code_high, scale);
  for (int j = 0; j < p->subs; j++)
    EACH_LANE {
      float change = (d[v] * scale[j][v] - f->scale[j][v]) * f->l[j][v] / (f->w[j][v] + TINY);
      wanted[j][v] = larger(f->low[j][v] + change, 0.0f);
    }
  farthest(wanted, p->subs, most);
  clear(&s);
  for (int k = 0; k < p->n_steps; k++)
    propose(p->subs, wanted, f->w, most, unit, p->code_high - (float)k * p->step, 0.0f, p->code_high, &s);
  memcpy(dmin, s.d[0], sizeof s.d[0]);
  codes_at(p->subs, wanted, dmin, 0.0f, p->code_high, low);
}

/* Where a sub-block's search for codes stands. */
typedef struct {
  Lanes least, scale, low, step, shift, inv, scaled_shift, l, ll, xl;
} Trial;

/* A scale code r from the centre; the minimum's centre follows it, so that the sub-block's mean stays. */
KERNEL place(Trial *t, float r, float q, float code_high, const float *restrict d, const float *restrict dmin,
             const float *restrict scale, const float *restrict low, const float *restrict mean_l) {
  EACH_LANE {
    float s = within(scale[v] + r, 0.0f, code_high);
    float follow = low[v] + d[v] * (s - scale[v]) * mean_l[v] * inverse(dmin[v]);
    float m = nearest(within(follow + q, 0.0f, code_high));
    t->scale[v] = s;
    t->low[v] = m;
    t->step[v] = d[v] * s;
    t->shift[v] = dmin[v] * m;
    t->inv[v] = inverse(t->step[v]);
    t->scaled_shift[v] = t->shift[v] * t->inv[v];
  }
}

KERNEL keep_pair(Trial *restrict t, const float *restrict w, const float *restrict wx, Chosen *restrict c,
                 int j) {
  EACH_LANE {
    float error = ranged_error(t->step[v], t->shift[v], w[v], wx[v], t->l[v], t->ll[v], t->xl[v]);
    int better = error < t->least[v];
    t->least[v] = better ? error : t->least[v];
    c->scale[j][v] = better ? t->scale[v] : c->scale[j][v];
    c->low[j][v] = better ? t->low[v] : c->low[j][v];
    c->l[j][v] = better ? t->l[v] : c->l[j][v];
    c->ll[j][v] = better ? t->ll[v] : c->ll[j][v];
    c->xl[j][v] = better ? t->xl[v] : c->xl[j][v];
  }
}

/* The best of some neighbouring pairs of codes for a sub-block, by its true error at d and dmin. */
INLINE void choose_pair(const Lanes *x, const Lanes *w, int n, const Ranged *p, const Fits *f, int j,
                        const float *d, const float *dmin, const float *scale, const float *low,
                        const float *mean_l, Chosen *c) {
  Trial t;
  EACH_LANE t.least[v] = BIG;
  for (int r = -p->reach; r <= p->reach; r++)
    for (int q = -1; q <= 1; q++) {
      place(&t, (float)r, (float)q, p->code_high, d, dmin, scale, low, mean_l);
      (n == 16 ? ranged_moments_16 : ranged_moments_32)(x, w, t.inv, t.scaled_shift, p->high, t.l, t.ll,
                                                        t.xl);
      keep_pair(&t, f->w[j], f->wx[j], c, j);
    }
}

/* The normal equations for d and dmin over all sub-blocks: x ~ d * s l - dmin * m. */
typedef struct {
  Lanes ss, sm, mm, xs, xm;
} Normal;

KERNEL add_normal(Normal *restrict n, const Fits *restrict f, const Chosen *restrict c, int j) {
  EACH_LANE {
    float s = c->scale[j][v], m = c->low[j][v];
    n->ss[v] += s * s * c->ll[j][v];
    n->sm[v] -= s * m * c->l[j][v];
    n->mm[v] += m * m * f->w[j][v];
    n->xs[v] += s * c->xl[j][v];
    n->xm[v] -= m * f->wx[j][v];
  }
}

KERNEL solve_normal(const Normal *restrict n, float *restrict d, float *restrict dmin) {
  EACH_LANE {
    float ss = n->ss[v], sm = n->sm[v], mm = n->mm[v], xs = n->xs[v], xm = n->xm[v];
    float det = ss * mm - sm * sm;
    int apart = det > ss * mm * PARALLEL;
    float inv = 1.0f / (apart ? det : 1.0f);
    float alone = (xs - dmin[v] * sm) / (ss + TINY), kept = mm > 0.0f ? dmin[v] : 0.0f;
    d[v] = larger(apart ? (xs * mm - sm * xm) * inv : alone, 0.0f);
    dmin[v] = larger(apart ? (ss * xm - sm * xs) * inv : kept, 0.0f);
  }
}

KERNEL judge_normal(const Normal *restrict n, const float *restrict d, const float *restrict dmin,
                    float *restrict least, int *restrict better) {
  EACH_LANE {
    float a = d[v], b = dmin[v];
    float error =
        a * (a * n->ss[v] + 2.0f * b * n->sm[v] - 2.0f * n->xs[v]) + b * (b * n->mm[v] - 2.0f * n->xm[v]);
    better[v] = error < least[v];
    least[v] = error < least[v] ? error : least[v];
  }
}

/* The d and dmin that fit all codes best together, and the block if it is the best so far. */
static void settle_pair(const Ranged *p, const Fits *f, const Chosen *c, const Lanes unit, Lanes d,
                        Lanes dmin, Lanes least, Found *found) {
  Normal n;
  memset(&n, 0, sizeof n);
  for (int j = 0; j < p->subs; j++) add_normal(&n, f, c, j);
  solve_normal(&n, d, dmin);
  round_to_half(d, unit);
  round_to_half(dmin, unit);
  Mask better;
  judge_normal(&n, d, dmin, least, better);
  keep_where(better, d, found->d);
  keep_where(better, dmin, found->dmin);
  for (int j = 0; j < p->subs; j++) {
    keep_where(better, c->scale[j], found->scale[j]);
    keep_where(better, c->low[j], found->low[j]);
  }
}

KERNEL store_shifted_codes(const Lanes *restrict x, int n, const float *restrict inv,
                           const float *restrict shift, float high, uint8_t (*restrict q)[LANES]) {
  for (int i = 0; i < n; i++)
    EACH_LANE q[i][v] = (uint8_t)(int)shifted_code(x[i][v], inv[v], shift[v], high);
}

INLINE void refine_pairs(const Tile *t, const Ranged *p, int n, const Fits *f, Lanes d, Lanes dmin,
                         Subs scale, Subs low, Lanes least, Found *found) {
  Subs mean_l;
  Chosen c;
  for (int j = 0; j < p->subs; j++)
    EACH_LANE mean_l[j][v] = f->l[j][v] / (f->w[j][v] + TINY);
  for (int round = 0; round < p->rounds; round++) {
    for (int j = 0; j < p->subs; j++)
      choose_pair(t->x + n * j, t->w + n * j, n, p, f, j, d, dmin, scale[j], low[j], mean_l[j], &c);
    settle_pair(p, f, &c, t->unit, d, dmin, least, found);
    memcpy(scale, c.scale, sizeof c.scale);
    memcpy(low, c.low, sizeof c.low);
    for (int j = 0; j < p->subs; j++)
      EACH_LANE mean_l[j][v] = c.l[j][v] / (f->w[j][v] + TINY);
  }
}

INLINE void search_ranged(const Tile *t, const Ranged *p, int n, Found *found) {
  Fits f;
  Shortlist list;
  Lanes d, dmin, least;
  Subs scale, low;
  for (int j = 0; j < p->subs; j++) fit_pair(t, p, n, j, &f);
  shortlist_scales(p, &f, t->unit, &list);
  EACH_LANE least[v] = 0.0f; /* what all zeros would leave */
  memset(found, 0, sizeof *found);
  for (int k = 0; k < p->candidates; k++) {
    EACH_LANE d[v] = list.d[k][v];
    first_codes(p, &f, t->unit, d, dmin, scale, low);
    refine_pairs(t, p, n, &f, d, dmin, scale, low, least, found);
  }
  for (int j = 0; j < p->subs; j++) {
    Lanes inv, shift;
    invert_product(found->d, found->scale[j], inv);
    EACH_LANE shift[v] = found->dmin[v] * found->low[j][v] * inv[v];
    store_shifted_codes(t->x + n * j, n, inv, shift, p->high, found->q + n * j);
  }
}

static void search_ranged_16(const Tile *t, const Ranged *p, Found *found) { search_ranged(t, p, 16, found); }
static void search_ranged_32(const Tile *t, const Ranged *p, Found *found) { search_ranged(t, p, 32, found); }

/* ---- one table: how wide each type is searched -------------------------------------------------------- */

#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

static const float STARTS_Q3[] = {-14.0f, -10.0f, -8.0f,  -6.6f,  -5.6f,  -4.8f,  -4.54f, -4.28f, -4.02f,
                                  -3.76f, -3.5f,  -3.24f, -2.98f, -2.72f, -2.46f, -2.2f,  8.0f,   5.5f,
                                  4.5f,   3.9f,   3.6f,   3.4f,   3.1f,   2.8f,   2.6f,   2.3f};
static const float STARTS_Q6[] = {-50.0f, -42.0f, -37.0f, -34.0f, -33.0f, -32.5f, -32.0f, -31.6f, -31.2f,
                                  -30.7f, -30.0f, -29.0f, -28.0f, -27.0f, -26.0f, -25.0f, -24.0f, 38.0f,
                                  33.0f,  32.0f,  31.0f,  30.0f,  29.0f,  28.0f,  27.0f};
static const float STARTS_Q8[] = {127.4f, 126.0f, 124.6f, 123.2f, 121.8f, 120.4f,
                                  119.0f, 117.6f, 116.2f, 114.8f, 113.4f, 112.0f};
static const float MARGINS_Q2[] = {-0.1f, 0.0f, 0.1f, 0.28f};
static const float MARGINS_Q4[] = {-0.036f, 0.0f, 0.03f, 0.07f, 0.12f};
static const float MARGINS_Q5[] = {-0.03f, -0.01f, 0.01f, 0.04f, 0.1f};

static const Symmetric Q3_K = {.low = -4.0f,
                               .high = 3.0f,
                               .code_low = -32.0f,
                               .code_high = 31.0f,
                               .starts = STARTS_Q3,
                               .n_starts = COUNT(STARTS_Q3),
                               .refits = 1,
                               .step = 0.5f,
                               .n_steps = 19,
                               .candidates = 2,
                               .rounds = 2};
static const Symmetric Q6_K = {.low = -32.0f,
                               .high = 31.0f,
                               .code_low = -128.0f,
                               .code_high = 127.0f,
                               .starts = STARTS_Q6,
                               .n_starts = COUNT(STARTS_Q6),
                               .refits = 1,
                               .step = 1.0f,
                               .n_steps = 16,
                               .candidates = 1,
                               .rounds = 2};
static const Symmetric Q8_0 = {
    .low = -127.0f, .high = 127.0f, .starts = STARTS_Q8, .n_starts = COUNT(STARTS_Q8), .refits = 1};
static const Ranged Q2_K = {.subs = 16,
                            .high = 3.0f,
                            .code_high = 15.0f,
                            .margins = MARGINS_Q2,
                            .n_margins = COUNT(MARGINS_Q2),
                            .refits = 2,
                            .step = 0.5f,
                            .n_steps = 13,
                            .candidates = 2,
                            .rounds = 3,
                            .reach = 1};
static const Ranged Q4_K = {.subs = 8,
                            .high = 15.0f,
                            .code_high = 63.0f,
                            .margins = MARGINS_Q4,
                            .n_margins = COUNT(MARGINS_Q4),
                            .refits = 1,
                            .step = 1.0f,
                            .n_steps = 11,
                            .candidates = 1,
                            .rounds = 2,
                            .reach = 2};
static const Ranged Q5_K = {.subs = 8,
                            .high = 31.0f,
                            .code_high = 63.0f,
                            .margins = MARGINS_Q5,
                            .n_margins = COUNT(MARGINS_Q5),
                            .refits = 1,
                            .step = 1.0f,
                            .n_steps = 11,
                            .candidates = 1,
                            .rounds = 2,
                            .reach = 2};

/* ggml's factor of a block's mean square in the weights of each type; 0: importance alone counts. */
static float sigma_of(int type) {
  switch (type) {
    case TYPE_Q2_K: return 1.0f;
    case TYPE_Q3_K:
    case TYPE_Q4_K:
    case TYPE_Q5_K: return 2.0f;
    default: return 0.0f;
  }
}

static void search(int type, const Tile *t, Found *found) {
  switch (type) {
    case TYPE_Q2_K: search_ranged_16(t, &Q2_K, found); break;
    case TYPE_Q3_K: search_symmetric(t, &Q3_K, found); break;
    case TYPE_Q4_K: search_ranged_32(t, &Q4_K, found); break;
    case TYPE_Q5_K: search_ranged_32(t, &Q5_K, found); break;
    case TYPE_Q6_K: search_symmetric(t, &Q6_K, found); break;
    default: search_q8_0(t, &Q8_0, found);
  }
}

/* ---- what Python calls -------------------------------------------------------------------------------- */

/* Rows of float32 to blocks. Importance: one value a column, or NULL. Returns 0, or -1 for another type or
 * rows that are no whole number of blocks. */
int encode_rows(int type, const float *values, const float *importance, int64_t rows, int64_t columns,
                uint8_t *out) {
  const Layout *layout = layout_of(type);
  if (!layout || columns <= 0 || columns % layout->elements) return -1;
  int n = layout->elements;
  int64_t per_row = columns / n, row_bytes = per_row * layout->bytes;
  Tile tile;
  Found found;
  Packed packed;
  float q[BLOCK];
  Lanes spread;
  for (int64_t c = 0; c < per_row; c++) {
    prepare_importance(importance ? importance + c * n : NULL, n, q);
    for (int64_t first = 0; first < rows; first += LANES) {
      const float *lanes[LANES];
      EACH_LANE lanes[v] = values + (first + v < rows ? first + v : rows - 1) * columns + c * n;
      gather(tile.x, n, lanes);
      normalise(tile.x, n, tile.unit, spread);
      weigh(tile.x, tile.w, n, q, spread, sigma_of(type));
      search(type, &tile, &found);
      EACH_LANE found.d[v] *= tile.unit[v];
      EACH_LANE found.dmin[v] *= tile.unit[v];
      layout->pack(&found, packed);
      for (int v = 0; v < LANES && first + v < rows; v++) {
        uint8_t *at = out + (first + v) * row_bytes + c * layout->bytes;
        for (int i = 0; i < layout->bytes; i++) at[i] = packed[i][v];
      }
    }
  }
  return 0;
}

/* ---- error feedback ------------------------------------------------------------------------------------ */

/* What is held of `span` columns of one row while its codes move. */
typedef struct {
  int8_t *code;
  float *step, *offset;
  float *gradient;  /* moments times (y - x), of every column */
  float *curvature; /* how much a column's gradient grows when its code does; BIG where the code has to stay */
  int64_t moved;
} Columns;

INLINE float best_code(const Columns *c, int64_t j, float low, float high) {
  return nearest(within((float)c->code[j] - c->gradient[j] / c->curvature[j], low, high));
}

static __attribute__((noinline)) int any_moves(const Columns *c, int64_t first, float low, float high) {
  int moves = 0;
  for (int64_t j = first; j < first + SCANNED; j++) moves |= best_code(c, j, low, high) != (float)c->code[j];
  return moves;
}

/* Moves codes of some columns to where (y - x)' M (y - x) is least with all others as they are, one by one. */
static void move(Columns *c, const float *moments, int64_t span, int64_t first, float low, float high) {
  for (int64_t j = first; j < first + SCANNED; j++) {
    int8_t code = (int8_t)best_code(c, j, low, high);
    if (code == c->code[j]) continue;
    add_scaled(c->gradient, moments + j * span, (float)(code - c->code[j]) * c->step[j], span);
    c->code[j] = code;
    c->moved++;
  }
}

/* Goes over all columns of some rows; a row that moved nothing the last time is through. */
static int64_t sweep(Columns *c, int n_rows, const float *moments, int64_t span, float low, float high) {
  int64_t moved = 0;
  int live[FED];
  for (int r = 0; r < n_rows; r++) {
    live[r] = c[r].moved > 0;
    c[r].moved = 0;
  }
  for (int64_t j = 0; j < span; j += SCANNED)
    for (int r = 0; r < n_rows; r++)
      if (live[r] && any_moves(c + r, j, low, high)) move(c + r, moments, span, j, low, high);
  for (int r = 0; r < n_rows; r++) moved += c[r].moved;
  return moved;
}

/* Reads the blocks of one row, and what a code's step changes. */
static void take_row(const Layout *layout, const float *x, const float *moments, int64_t span, const uint8_t *raw,
                     Columns *c, Errors *error, int r) {
  for (int64_t j = 0; j < span; j += layout->elements)
    layout->take(raw + j / layout->elements * layout->bytes, c->code + j, c->step + j, c->offset + j);
  for (int64_t j = 0; j < span; j++) {
    float own = moments[j * span + j];
    error[j][r] = c->step[j] * (float)c->code[j] - c->offset[j] - x[j];
    c->curvature[j] = c->step[j] == 0.0f || own <= 0.0f ? BIG : own * c->step[j];
  }
  c->moved = 1;
}

/* Feeds back the errors of up to FED rows, which lie `stride` values and `raw_stride` bytes apart. */
static void feed_back_rows(const Layout *layout, int n_rows, const float *x, int64_t stride, const float *moments,
                           int64_t span, int64_t sweeps, Columns *c, Errors *error, uint8_t *raw,
                           int64_t raw_stride) {
  memset(error, 0, (size_t)span * sizeof(Errors));
  for (int r = 0; r < n_rows; r++)
    take_row(layout, x + r * stride, moments, span, raw + r * raw_stride, c + r, error, r);
  start_gradients(error, moments, span, c[0].gradient); /* the rows' gradients lie one after the other */
  while (sweeps-- > 0 && sweep(c, n_rows, moments, span, (float)layout->low, (float)layout->high) > 0) continue;
  for (int r = 0; r < n_rows; r++)
    for (int64_t j = 0; j < span; j += layout->elements)
      layout->put(c[r].code + j, raw + r * raw_stride + j / layout->elements * layout->bytes);
}

/* Error feedback: with scales as they are, chooses codes anew so that what a row gives for the activations
 * it will meet stays what it was, instead of each weight on its own. Moments: of every `span` columns,
 * (span, span) means of products of activations. Returns 0, or -1 for sizes that do not fit, -2 without memory. */
int feed_back(int type, const float *values, const float *moments, int64_t rows, int64_t columns, int64_t span,
              int64_t sweeps, uint8_t *raw) {
  const Layout *layout = layout_of(type);
  if (!layout || span <= 0 || span % layout->elements || columns % span) return -1;
  float *floats = malloc((size_t)span * 5 * FED * sizeof(float));
  int8_t *codes = malloc((size_t)span * FED);
  int64_t row_bytes = columns / layout->elements * layout->bytes, many = FED * span;
  Columns c[FED];
  for (int r = 0; floats && codes && r < FED; r++)
    c[r] = (Columns){.code = codes + r * span,
                     .gradient = floats + r * span,
                     .step = floats + many + r * span,
                     .offset = floats + 2 * many + r * span,
                     .curvature = floats + 3 * many + r * span};
  for (int64_t s = 0; floats && codes && s < columns / span; s++)
    for (int64_t r = 0; r < rows; r += FED)
      feed_back_rows(layout, rows - r < FED ? (int)(rows - r) : FED, values + r * columns + s * span, columns,
                     moments + s * span * span, span, sweeps, c, (Errors *)(floats + 4 * many),
                     raw + r * row_bytes + s * span / layout->elements * layout->bytes, row_bytes);
  free(floats);
  free(codes);
  return floats && codes ? 0 : -2;
}

/* Blocks back to float32, as ggml and gguf-py read them. */
int decode_blocks(int type, const uint8_t *raw, int64_t count, float *out) {
  const Layout *layout = layout_of(type);
  if (!layout) return -1;
  int8_t code[BLOCK];
  float step[BLOCK], offset[BLOCK];
  for (int64_t block = 0; block < count; block++) {
    layout->take(raw + block * layout->bytes, code, step, offset);
    float *y = out + block * layout->elements;
    for (int i = 0; i < layout->elements; i++) y[i] = step[i] * (float)code[i] - offset[i];
  }
  return 0;
}

/* Of every block of `elements`: sum q x^2 and sum q x y, with y what the block is read back as. */
void project(const float *values, const float *rounded, const float *importance, int64_t rows,
             int64_t columns, int64_t elements, double *sums) {
  int64_t per_row = columns / elements;
  for (int64_t block = 0; block < rows * per_row; block++) {
    const float *x = values + block * elements, *y = rounded + block * elements;
    const float *q = importance ? importance + (block % per_row) * elements : NULL;
    double xx[8] = {0}, xy[8] = {0};
    for (int64_t i = 0; i < elements; i += 8)
      for (int k = 0; k < 8; k++) {
        double wx = (q ? (double)q[i + k] : 1.0) * (double)x[i + k];
        xx[k] += wx * (double)x[i + k];
        xy[k] += wx * (double)y[i + k];
      }
    for (int k = 1; k < 8; k++) {
      xx[0] += xx[k];
      xy[0] += xy[k];
    }
    sums[2 * block] = xx[0];
    sums[2 * block + 1] = xy[0];
  }
}

/* Scales the halves at `offset` of every block so that what `share` blocks in a row project on their
 * originals is kept: 1 + strength * (sum q x^2 / sum q x y - 1), the quotient within [least, most]. */
void rescale(uint8_t *raw, int64_t count, int64_t bytes, int64_t offset, int64_t halves, const double *sums,
             int64_t share, double strength, double least, double most) {
  for (int64_t first = 0; first < count; first += share) {
    int64_t last = first + share < count ? first + share : count;
    double xx = 0.0, xy = 0.0;
    for (int64_t i = first; i < last; i++) {
      xx += sums[2 * i];
      xy += sums[2 * i + 1];
    }
    double quotient = xy > 0.0 ? xx / xy : 1.0;
    quotient = quotient < least ? least : quotient > most ? most : quotient;
    float factor = (float)(1.0 + strength * (quotient - 1.0));
    for (int64_t i = first; i < last; i++)
      for (int64_t k = 0; k < halves; k++) {
        uint8_t *at = raw + i * bytes + offset + 2 * k;
        put_half(at, get_half(at) * factor);
      }
  }
}
