/* What the kernel is asked to compute, and how channels are read and written. */
#pragma once

#include "../vector.h"

/* Where a (groups, images, sets, length, columns) array lies: strides in elements, columns side by side. */
typedef struct {
    const void *data;
    int64_t group, image, set, row;
} View;

/* V, the number of parameter sets, is 1 where the orders share their parameters, else the number of orders K.
 *
 * x, dy (G, I, L, D) and delta (G, I, V, L, D) are bfloat16 where `half`, else float32; so are y, dx and ddelta, of the same
 * shapes and contiguous. B and C (G, I, V, L, N) are float32. A (G, V, D, N), D and bias (G, V, D) and orders (K, L) are
 * contiguous. The gradients dA (G, I, V, D, N), dD (G, I, D) and dbias (G, I, V, D) are parts that the caller sums over images;
 * dD is that of one order. dB and dC are (G, I, V, L, N).
 */
typedef struct {
    int64_t groups, images, orders_count, sets, length, channels, states, slices, half, softplus;
    View x, delta, B, C, dy;
    const float *A, *D, *bias;
    const int32_t *orders;
    void *y, *dx, *ddelta;
    float *dA, *dB, *dC, *dD, *dbias;
    float *work;  /* threads × scan_workspace() floats, aligned to 64 bytes */
    float *parts; /* backward: scan_parts() floats */
} Problem;

/* Offset of a view's first row for one parameter set of one image, counted over the groups. */
static int64_t view_start(const Problem *p, const View *view, int64_t image, int64_t set) {
    return image / p->images * view->group + image % p->images * view->image + set * view->set;
}

/* One block of A, a[n][lane]; states from `count` on and channels from `width` on are zero. */
static void load_A(vec *a, const Problem *p, int64_t image, int64_t set, int64_t first, int64_t state, int64_t width, int count,
                   int block) {
    const float *A = p->A + ((image / p->images * p->sets + set) * p->channels + first) * p->states + state;
    for (int n = 0; n < block; n++) {
        float lanes[LANES] = {0};
        for (int64_t c = 0; n < count && c < width; c++) lanes[c] = A[c * p->states + n];
        memcpy(a + n, lanes, sizeof(vec));
    }
}

#define LOG2_E 1.44269504088896341f

/* 2^(x y), relative error 2e-7 beyond the rounding of x y; limits as those of exp2_vec. */
INLINE vec exp2_product(vec x, vec y) {
#if LANES == 16
    /* 2^(i/16) from a table leaves a polynomial of degree 3. Near 1, where slow decays add errors up, only rounding is left. */
    static const float powers[16] = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                                     1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                     1.68179286f, 1.75625217f, 1.83400810f, 1.91520655f};
    __m512 product = (__m512)(x * y);
    __m512 whole = _mm512_roundscale_ps(product, 4 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); /* sixteenths */
    __m512i index = (__m512i)((vec)whole + ROUNDING / 16); /* in the low four bits */
    vec f = (vec)product - (vec)whole, power = (vec)_mm512_permutexvar_ps(index, _mm512_loadu_ps(powers));
    vec p = power + power * f * ((f * 5.5504109e-2f + 0.24022651f) * f + 0.69314718f);
    return (vec)_mm512_scalef_ps((__m512)p, whole);
#else
    return exp2_vec(x * y);
#endif
}

/* One block's columns of B and C side by side, (length, 2, block), states from `count` on zero. */
INLINE void load_strip(float *strip, const Problem *p, int64_t image, int64_t set, int64_t first, int count, int block) {
    const float *B = (const float *)p->B.data + view_start(p, &p->B, image, set) + first;
    const float *C = (const float *)p->C.data + view_start(p, &p->C, image, set) + first;
    for (int64_t l = 0; l < p->length; l++, strip += 2 * block, B += p->B.row, C += p->C.row) {
        if (count == block) { /* copies of a constant size */
            memcpy(strip, B, block * sizeof(float));
            memcpy(strip + block, C, block * sizeof(float));
            continue;
        }
        memset(strip, 0, 2 * block * sizeof(float));
        memcpy(strip, B, count * sizeof(float));
        memcpy(strip + block, C, count * sizeof(float));
    }
}

/* Sum over the orders of D for the channels [first, first + width). */
static vec load_skip(const Problem *p, int64_t group, int64_t first, int64_t width) {
    vec skip = {0};
    for (int64_t set = 0; set < p->sets; set++) skip += load_channels(p->D, (group * p->sets + set) * p->channels + first, width, 0);
    return p->sets > 1 ? skip : skip * (float)p->orders_count;
}
