/* What error feedback in all types begins with: a row's gradients, several rows at a time; and small tools.
 *
 * The gradient of a row is M (y - x): M the moments, x the row and y what its blocks read back as. */
#ifndef CEREBELLUM_FEEDBACK_H
#define CEREBELLUM_FEEDBACK_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define KERNEL static __attribute__((noinline)) void
#define BIG 3e38f

INLINE float magnitude(float a) { return a < 0.0f ? -a : a; }
INLINE float smaller(float a, float b) { return a < b ? a : b; }
INLINE float larger(float a, float b) { return a > b ? a : b; }
INLINE float within(float a, float low, float high) { return smaller(larger(a, low), high); }
/* To the nearest integer, half to even, for |a| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction. */
#define MAGIC 12582912.0f
INLINE float nearest(float a) { return (a + MAGIC) - MAGIC; }

#define FED 8      /* rows whose codes move side by side, so that a line of moments is read once for all of them */
#define SCANNED 16 /* columns that are looked at together: whether any of their codes wants to move */

typedef float Errors[FED]; /* y - x of one column of every row */

/* Adds to the gradients of four rows their errors in SCANNED columns times the lines of moments of those, in order. */
KERNEL add_lines(const Errors *restrict error, const float *restrict lines, int64_t span, float *restrict g0,
                 float *restrict g1, float *restrict g2, float *restrict g3) {
  for (int64_t k = 0; k < span; k++) {
    float a = g0[k], b = g1[k], c = g2[k], d = g3[k];
#pragma GCC unroll 16
    for (int j = 0; j < SCANNED; j++) {
      float m = lines[j * span + k];
      a = fmaf(error[j][0], m, a);
      b = fmaf(error[j][1], m, b);
      c = fmaf(error[j][2], m, c);
      d = fmaf(error[j][3], m, d);
    }
    g0[k] = a;
    g1[k] = b;
    g2[k] = c;
    g3[k] = d;
  }
}

/* gradient[r] = sum over columns of errors times lines of moments, in the order of the columns. */
static void start_gradients(const Errors *error, const float *moments, int64_t span, float *gradient) {
  memset(gradient, 0, (size_t)span * sizeof(Errors));
  for (int64_t j = 0; j < span; j += SCANNED)
    for (int r = 0; r < FED; r += 4) {
      float *of_row = gradient + r * span;
      add_lines((const Errors *)(error[j] + r), moments + j * span, span, of_row, of_row + span, of_row + 2 * span,
                of_row + 3 * span);
    }
}

KERNEL add_scaled(float *restrict sum, const float *restrict row, float factor, int64_t n) {
  for (int64_t k = 0; k < n; k++) sum[k] = fmaf(factor, row[k], sum[k]);
}

#endif
