/* The discrete Fourier transform of 16 × 16 real numbers, of LANES such squares at a time.
 *
 * Half of a real square's spectrum says all: column 0 and 8 of it have SIDE / 2 + 1 frequencies of their own, columns 1 to 7 have
 * SIDE. They are numbered column by column, 0 and 8 last.
 */
#pragma once

#include "vector.h"

#define SIDE 16
#define HALF (SIDE / 2)
#define FREQUENCIES ((HALF - 1) * SIDE + 2 * (HALF + 1))
#define FIRST_COLUMN ((HALF - 1) * SIDE)
#define LAST_COLUMN (FIRST_COLUMN + HALF + 1)

typedef struct {
    vec re, im;
} Complex;

INLINE Complex plus(Complex a, Complex b) { return (Complex){a.re + b.re, a.im + b.im}; }
INLINE Complex minus(Complex a, Complex b) { return (Complex){a.re - b.re, a.im - b.im}; }
INLINE Complex swapped(Complex a) { return (Complex){a.im, a.re}; }

#define COS_1 0.92387953f /* cosine of 2π / 16 */
#define SIN_1 0.38268343f
#define ROOT 0.70710678f

/* a · exp(−2πi · power / 16); power is a constant where this is called. */
INLINE Complex turned(Complex a, int power) {
    static const float cosine[10] = {1, COS_1, ROOT, SIN_1, 0, -SIN_1, -ROOT, -COS_1, -1, -COS_1};
    static const float sine[10] = {0, SIN_1, ROOT, COS_1, 1, COS_1, ROOT, SIN_1, 0, -SIN_1};
    if (power == 0) return a;
    if (power == 4) return (Complex){a.im, -a.re};
    float c = cosine[power], s = sine[power];
    return (Complex){a.re * c + a.im * s, a.im * c - a.re * s};
}

/* Four-point transform in place, of elements `step` apart. */
INLINE void transform_4(Complex *z, int step) {
    Complex a = plus(z[0], z[2 * step]), b = minus(z[0], z[2 * step]);
    Complex c = plus(z[step], z[3 * step]), d = minus(z[step], z[3 * step]);
    z[0] = plus(a, c);
    z[step] = (Complex){b.re + d.im, b.im - d.re};
    z[2 * step] = minus(a, c);
    z[3 * step] = (Complex){b.re - d.im, b.im + d.re};
}

/* 16-point transform of z; frequency 4 i + j is left at 4 j + i. */
INLINE void transform_16(Complex *z) {
    UNROLLED for (int i = 0; i < 4; i++) transform_4(z + i, 4);
    UNROLLED for (int j = 1; j < 4; j++)
        UNROLLED for (int i = 1; i < 4; i++) z[4 * j + i] = turned(z[4 * j + i], i * j);
    UNROLLED for (int j = 0; j < 4; j++) transform_4(z + 4 * j, 1);
}

#define AT(frequency) ((frequency) % 4 * 4 + (frequency) / 4) /* where transform_16 leaves it */

/* Spectra of two real signals that were transformed as one, a + i b: twice the first and twice the second at `k`. */
INLINE Complex first_of(const Complex *z, int k) {
    Complex here = z[AT(k)], there = z[AT((SIDE - k) % SIDE)];
    return (Complex){here.re + there.re, here.im - there.im};
}
INLINE Complex second_of(const Complex *z, int k) {
    Complex here = z[AT(k)], there = z[AT((SIDE - k) % SIDE)];
    return (Complex){here.im + there.im, there.re - here.re};
}

/* A square, its rows `stride` apart, zero from `rows` on, which is even → twice its spectrum (FREQUENCIES). */
static void spectrum(const vec *square, int64_t stride, int rows, Complex *out) {
    Complex half[HALF + 1][SIDE]; /* column, row; columns 0 and 8 are real and stand together in the last */
    memset(half, 0, sizeof half);
    for (int y = 0; y < rows; y += 2) {
        Complex z[SIDE];
        UNROLLED for (int x = 0; x < SIDE; x++) z[x] = (Complex){square[y * stride + x], square[(y + 1) * stride + x]};
        transform_16(z);
        UNROLLED for (int k = 1; k < HALF; k++) {
            half[k][y] = first_of(z, k);
            half[k][y + 1] = second_of(z, k);
        }
        half[HALF][y] = (Complex){z[AT(0)].re, z[AT(HALF)].re};
        half[HALF][y + 1] = (Complex){z[AT(0)].im, z[AT(HALF)].im};
    }
    for (int k = 1; k <= HALF; k++) {
        Complex z[SIDE];
        UNROLLED for (int y = 0; y < SIDE; y++) z[y] = half[k][y];
        transform_16(z);
        if (k < HALF) {
            UNROLLED for (int y = 0; y < SIDE; y++) out[(k - 1) * SIDE + y] = z[AT(y)];
        } else {
            UNROLLED for (int y = 0; y <= HALF; y++) {
                out[FIRST_COLUMN + y] = first_of(z, y);
                out[LAST_COLUMN + y] = second_of(z, y);
            }
        }
    }
}

/* A spectrum → the first HALF × HALF numbers of its square, times SIDE². */
static void square_of(const Complex *spectrum, vec *square) {
    Complex half[HALF][SIDE]; /* row, column; what stands at 8 belongs to the column of that number */
    for (int k = 0; k < HALF; k++) {
        Complex z[SIDE];
        UNROLLED for (int y = 0; y < SIDE; y++) {
            if (k > 0) {
                z[y] = swapped(spectrum[(k - 1) * SIDE + y]);
            } else { /* a + i b of the two real columns, the second half of their spectra mirrored */
                Complex a = spectrum[FIRST_COLUMN + (y <= HALF ? y : SIDE - y)];
                Complex b = spectrum[LAST_COLUMN + (y <= HALF ? y : SIDE - y)];
                if (y > HALF) a.im = -a.im, b.im = -b.im;
                z[y] = (Complex){a.im + b.re, a.re - b.im};
            }
        }
        transform_16(z);
        UNROLLED for (int y = 0; y < HALF; y++) half[y][k] = swapped(z[AT(y)]);
    }
    for (int y = 0; y < HALF; y += 2) {
        Complex z[SIDE];
        const Complex *a = half[y], *b = half[y + 1];
        z[0] = (Complex){b[0].re, a[0].re};
        z[HALF] = (Complex){b[0].im, a[0].im};
        UNROLLED for (int k = 1; k < HALF; k++) {
            z[k] = (Complex){a[k].im + b[k].re, a[k].re - b[k].im};
            z[SIDE - k] = (Complex){b[k].re - a[k].im, a[k].re + b[k].im};
        }
        transform_16(z);
        UNROLLED for (int x = 0; x < HALF; x++) {
            square[y * HALF + x] = z[AT(x)].im;
            square[(y + 1) * HALF + x] = z[AT(x)].re;
        }
    }
}
