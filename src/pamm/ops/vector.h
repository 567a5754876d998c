/* Vectors of LANES neighbouring channels: how they are read and written, and functions of them. */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Steps that cover a size. */
static inline int64_t steps_of(int64_t size, int64_t step) { return (size + step - 1) / step; }

INLINE vec splat(float value) { return value - (vec){0}; }

INLINE vec select_vec(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* Bytes that `width` numbers, at most those of a vector, take. */
static inline size_t bytes_of(int64_t width, size_t each) { return width > 0 ? (size_t)smaller(width, LANES) * each : 0; }

/* `width` neighbouring channels as a vector, the other lanes zero. */
INLINE vec load_channels(const void *data, int64_t at, int64_t width, int64_t half) {
    hvec narrow = {0};
    vec wide = {0};
    if (half) {
        memcpy(&narrow, (const uint16_t *)data + at, width < LANES ? bytes_of(width, 2) : sizeof narrow);
        return (vec)(__builtin_convertvector(narrow, uvec) << 16);
    }
    if (width >= LANES) {
        memcpy(&wide, (const float *)data + at, sizeof wide);
        return wide;
    }
    memcpy(&wide, (const float *)data + at, bytes_of(width, 4));
    return wide;
}

INLINE void store_channels(void *data, int64_t at, int64_t width, int64_t half, vec value) {
    if (half) { /* rounded to the nearest, to even between two */
        uvec bits = (uvec)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        ivec number = value == value;
        hvec narrow = __builtin_convertvector((rounded & (uvec)number) | (0x7fc0 & ~(uvec)number), hvec);
        memcpy((uint16_t *)data + at, &narrow, width < LANES ? bytes_of(width, 2) : sizeof narrow);
    } else if (width >= LANES) {
        memcpy((float *)data + at, &value, sizeof value);
    } else {
        memcpy((float *)data + at, &value, bytes_of(width, 4));
    }
}

/* 2^f for f in [−½, ½], relative error 2e-7; 1 at 0. */
INLINE vec exp2_polynomial(vec f) {
    vec p = splat(1.3202982e-3f);
    p = p * f + 9.6749524e-3f;
    p = p * f + 5.5510472e-2f;
    p = p * f + 0.24022166f;
    p = p * f + 0.69314659f;
    return p * f + 1.0f;
}

#define ROUNDING 12582912.0f /* 1.5 · 2^23: adding it rounds to an integer, which stands in the low bits */

/* 2^x, relative error 2e-7; 0 below 2^-126 (with AVX-512 below 2^-149), infinity from 2^128 on, NaN for NaN. */
INLINE vec exp2_vec(vec x) {
#if LANES == 16
    vec whole = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vec)_mm512_scalef_ps((__m512)exp2_polynomial(x - whole), (__m512)whole);
#else
    vec limited = select_vec(x > 128.0f, splat(128.0f), x);
    vec shifted = limited + ROUNDING;
    vec p = exp2_polynomial(limited - (shifted - ROUNDING));
    vec result = (vec)((ivec)p + ((ivec)shifted << 23));
    return select_vec(x != x, x, (vec)((ivec)result & ~(x < -126.0f)));
#endif
}

/* e^x for x ≤ 0, relative error 2e-7; 0 below 2^-126. The product with log2(e) is rounded after the integer is taken off. */
INLINE vec exp_negative(vec x) {
    vec shifted = x * 1.44269504f + ROUNDING, whole = shifted - ROUNDING;
    vec f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec result = (vec)((ivec)exp2_polynomial(f * 1.44269504f) + ((ivec)shifted << 23));
    return (vec)((ivec)result & ~(x < -87.33654f));
}

/* Softplus and its derivative, relative errors 3e-7. */
INLINE vec softplus_vec(vec x, vec *slope) {
    vec z = exp_negative(select_vec(x > 0.0f, -x, x)), s = z / (z + 2.0f), q = s * s; /* log(1 + z) = 2 artanh(s) */
    vec p = splat(0.13425772f);
    p = p * q + 0.14118306f;
    p = p * q + 0.20003781f;
    p = p * q + 0.3333332f;
    p = p * q + 1.0f;
    *slope = select_vec(x > 0.0f, splat(1.0f), z) / (z + 1.0f);
    return select_vec(x < 0.0f, (vec){0}, x) + 2.0f * (s * p);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

#if LANES == 16
#define LANE_LIST(F, s) F(0, s), F(1, s), F(2, s), F(3, s), F(4, s), F(5, s), F(6, s), F(7, s), \
    F(8, s), F(9, s), F(10, s), F(11, s), F(12, s), F(13, s), F(14, s), F(15, s)
#elif LANES == 8
#define LANE_LIST(F, s) F(0, s), F(1, s), F(2, s), F(3, s), F(4, s), F(5, s), F(6, s), F(7, s)
#else
#define LANE_LIST(F, s) F(0, s), F(1, s), F(2, s), F(3, s)
#endif

/* Half as many partial sums of a and of b: in every four groups of s lanes, neighbours are added, two sums of a's beside two of
 * b's. Within four lanes this is the cheapest of shuffles.
 */
#define EVEN_LANE(i, s) ((i) / (4 * (s)) * 4 * (s) + (i) / (s) % 2 * 2 * (s) + (i) % (s) + (i) / (s) % 4 / 2 * LANES)
#define ODD_LANE(i, s) (EVEN_LANE(i, s) + (s))
#define DEFINE_FOLD(name, s)                                                                              \
    INLINE vec name(vec a, vec b) {                                                                       \
        return SHUFFLE(a, b, LANE_LIST(EVEN_LANE, s)) + SHUFFLE(a, b, LANE_LIST(ODD_LANE, s));            \
    }
DEFINE_FOLD(fold_lanes, 1)
#if LANES == 16
DEFINE_FOLD(fold_quads, 4)
#elif LANES == 8
INLINE vec fold_quads(vec a, vec b) { return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15); }
#endif

/* Loops over what lives in registers are written out. */
#define UNROLLED _Pragma("GCC unroll 16")

#define UPPER_LANE(i, s) ((i) / (s) % 2 ? (i) - (s) + LANES : (i))
#define LOWER_LANE(i, s) ((i) / (s) % 2 ? (i) + LANES : (i) + (s))
#define TRANSPOSE_STEP(rows, s)                                                            \
    UNROLLED for (int i = 0; i < LANES; i++) if (i / (s) % 2 == 0) {                       \
        vec a = rows[i], b = rows[i + (s)];                                                \
        rows[i] = SHUFFLE(a, b, LANE_LIST(UPPER_LANE, s));                                 \
        rows[i + (s)] = SHUFFLE(a, b, LANE_LIST(LOWER_LANE, s));                           \
    }

/* LANES vectors as the rows of a square → its columns. */
INLINE void transpose(vec rows[LANES]) {
#if LANES == 16
    TRANSPOSE_STEP(rows, 8)
#endif
#if LANES >= 8
    TRANSPOSE_STEP(rows, 4)
#endif
    TRANSPOSE_STEP(rows, 2)
    TRANSPOSE_STEP(rows, 1)
}
