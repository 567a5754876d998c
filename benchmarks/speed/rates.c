/* What a processor can do at most in the arithmetic of a scan: fused multiply-adds, and exponentials by a polynomial.
   Each function returns the number of lane operations it has done; `out` keeps the compiler from leaving them out. */

#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define CHAINS 10 /* independent sums: more than latency times units, fewer than registers */
#define BUFFER 64 /* vectors, in the first cache */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static vec all(float value) { return value - (vec){0}; }

int64_t multiply_adds(int64_t rounds, float *out) {
    vec sum[CHAINS];
    const vec factor = all(0.999f), term = all(out[0]);
    for (int k = 0; k < CHAINS; k++) sum[k] = all(1.0f + k);
    for (int64_t r = 0; r < rounds; r++)
        for (int k = 0; k < CHAINS; k++) sum[k] = sum[k] * factor + term;
    for (int k = 1; k < CHAINS; k++) sum[0] += sum[k];
    out[0] = sum[0][0];
    return rounds * CHAINS * LANES;
}

static vec exp2_degree_5(vec x) {
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vec shifted = x + magic, rest = x - (shifted - magic);
    vec p = all(0.0013333f) * rest + 0.0096181f;
    p = p * rest + 0.0555041f;
    p = p * rest + 0.2402265f;
    p = p * rest + 0.6931472f;
    p = p * rest + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

int64_t exponentials(int64_t rounds, float *out) {
    vec buffer[BUFFER];
    for (int k = 0; k < BUFFER; k++) buffer[k] = all(-0.01f * k + out[0]);
    for (int64_t r = 0; r < rounds; r++)
        for (int k = 0; k < BUFFER; k++) buffer[k] = -exp2_degree_5(buffer[k]);
    for (int k = 1; k < BUFFER; k++) buffer[0] += buffer[k];
    out[0] = buffer[0][0];
    return rounds * BUFFER * LANES;
}
