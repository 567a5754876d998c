/* A convolution of one image whose 9×9 kernel is a base plus a weighted sum of parts, by Fourier transforms of squares.
 *
 * Output squares of HALF × HALF positions see SIDE × SIDE positions of the input. For CHANNELS input channels at a time the
 * squares' spectra are made, then for LANES outputs the kernels are summed and their spectra made, and both are multiplied and
 * added to the outputs' spectra. So no kernel is ever written to memory. A slice of the channels is one job with sums of its own;
 * the split depends only on the shapes: the result has the same bits for any number of threads.
 */
#include "../ops/jobs.h"
#include "../ops/vector.h"

/* The discrete Fourier transform of 16 × 16 real numbers, of LANES such squares at a time.
 *
 * Half of a real square's spectrum says all: column 0 and 8 of it have SIDE / 2 + 1 frequencies of their own, columns 1 to 7 have
 * SIDE. They are numbered column by column, 0 and 8 last.
 */

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

/* -- the convolution ----------------------------------------------------------------------------------------------------- */

#define TAPS 9
#define KERNEL (TAPS * TAPS)
#define BORDER (TAPS / 2)
#define CHANNELS LANES /* of the input that are transformed at a time */
#define UNIT (1.0f / (4 * SIDE * SIDE)) /* of a product of two spectra, which are twice what they should be */

#if LANES == 16
#define MOST_SQUARES 10 /* whose sums are in registers at once */
#else
#define MOST_SQUARES 5
#endif

typedef struct {
    int64_t height, width, channels, outputs, parts, slices, half;
    int64_t row, column;      /* strides of x, (height, width, channels) with channels side by side, bfloat16 where `half` */
    const void *x;
    const float *weights;     /* (outputs in whole vectors / LANES, parts, LANES) */
    const float *base;        /* (outputs, channels, 9, 9) */
    const float *const *part; /* (channels, 9, 9) each */
    Complex *sums;            /* (slices, groups of LANES outputs, FREQUENCIES, squares), aligned to 64 bytes */
    float *y;                 /* (height, width, outputs) */
    float *work;              /* threads × mixed_workspace() floats, aligned to 64 bytes */
} Mixed;

static int64_t squares(const Mixed *p) { return steps_of(p->height, HALF) * steps_of(p->width, HALF); }

/* Positions along a side that the squares see. */
static int64_t padded(int64_t size) { return steps_of(size, HALF) * HALF + SIDE - HALF; }

static int64_t groups(const Mixed *p) { return steps_of(p->outputs, LANES); }

static int64_t sums_size(const Mixed *p) { return FREQUENCIES * squares(p); }

/* Floats of `sums`. */
int64_t mixed_sums(const Mixed *p) { return p->slices * groups(p) * sums_size(p) * 2 * LANES; }

/* Floats that one thread needs, a multiple of 16. */
int64_t mixed_workspace(const Mixed *p) {
    int64_t spectra = FREQUENCIES * 2 * LANES * (squares(p) + CHANNELS), image = padded(p->height) * padded(p->width) * LANES;
    return spectra + image + steps_of(p->parts * CHANNELS * KERNEL, 16) * 16;
}

/* CHANNELS channels of the image with zeros around, (positions down, positions across) vectors. */
static void copy_image(const Mixed *p, int64_t channel, int64_t present, vec *out) {
    for (int64_t r = -BORDER; r < padded(p->height) - BORDER; r++)
        for (int64_t c = -BORDER; c < padded(p->width) - BORDER; c++) {
            int inside = r >= 0 && r < p->height && c >= 0 && c < p->width;
            int64_t at = r * p->row + c * p->column + channel;
            *out++ = inside ? load_channels(p->x, at, present, p->half) : (vec){0};
        }
}

/* Spectra (squares, FREQUENCIES) of what copy_image wrote. */
static void image_spectra(const Mixed *p, const vec *image, Complex *out) {
    int64_t across = steps_of(p->width, HALF), stride = padded(p->width);
    for (int64_t square = 0; square < squares(p); square++) {
        const vec *corner = image + (square / across * stride + square % across) * HALF;
        spectrum(corner, stride, SIDE, out + square * FREQUENCIES);
    }
}

/* The parts' kernels of `present` channels, (parts, CHANNELS · KERNEL), each part in one piece. */
static void copy_parts(const Mixed *p, int64_t channel, int64_t present, float *out) {
    for (int64_t j = 0; j < p->parts; j++)
        memcpy(out + j * CHANNELS * KERNEL, p->part[j] + channel * KERNEL, present * KERNEL * sizeof(float));
}

/* The base kernels of LANES outputs and one channel, (KERNEL) vectors over the outputs. */
static void load_base(const Mixed *p, int64_t group, int64_t channel, vec *kernel) {
    for (int64_t step = 0; step < KERNEL; step += LANES) {
        int64_t tap = smaller(step, KERNEL - LANES);
        vec rows[LANES];
        for (int64_t i = 0; i < LANES; i++) {
            int64_t output = group * LANES + i;
            rows[i] = (vec){0};
            if (output >= p->outputs) continue;
            const float *from = p->base + (output * p->channels + channel) * KERNEL + tap;
            memcpy(&rows[i], from, sizeof(vec));
            __builtin_prefetch(from + 2 * KERNEL);
        }
        transpose(rows);
        memcpy(kernel + tap, rows, sizeof rows);
    }
}

/* Add the weighted parts of one channel to its kernels. `parts` is the channel's place in what copy_parts wrote. */
static void add_parts(const Mixed *p, int64_t group, const float *parts, vec *kernel) {
    const float *weights = p->weights + group * p->parts * LANES;
    for (int64_t tap = 0; tap < KERNEL; tap += TAPS) {
        vec sums[TAPS];
        UNROLLED for (int i = 0; i < TAPS; i++) sums[i] = kernel[tap + i];
        for (int64_t j = 0; j < p->parts; j++) {
            const float *part = parts + j * CHANNELS * KERNEL + tap;
            vec weight;
            memcpy(&weight, weights + j * LANES, sizeof weight);
            UNROLLED for (int i = 0; i < TAPS; i++) sums[i] += part[i] * weight;
        }
        UNROLLED for (int i = 0; i < TAPS; i++) kernel[tap + i] = sums[i];
    }
}

/* Spectra (CHANNELS, FREQUENCIES) of the kernels of LANES outputs. */
static void kernel_spectra(const Mixed *p, int64_t group, int64_t channel, int64_t present, const float *parts, Complex *out) {
    vec square[(TAPS + 1) * SIDE];
    memset(square, 0, sizeof square);
    for (int64_t c = 0; c < present; c++) {
        vec kernel[KERNEL];
        load_base(p, group, channel + c, kernel);
        add_parts(p, group, parts + c * KERNEL, kernel);
        for (int y = 0; y < TAPS; y++) memcpy(square + y * SIDE, kernel + y * TAPS, TAPS * sizeof(vec));
        spectrum(square, SIDE, TAPS + 1, out + c * FREQUENCIES);
    }
}

/* sums += image · conjugate kernel over the channels, for one frequency and `count` squares; count is a constant where called. */
INLINE void add_products(int count, int64_t present, const Complex *image, const Complex *kernel, Complex *sums) {
    Complex sum[MOST_SQUARES];
    UNROLLED for (int t = 0; t < count; t++) sum[t] = sums[t];
    for (int64_t c = 0; c < present; c++) {
        Complex k = kernel[c * FREQUENCIES];
        UNROLLED for (int t = 0; t < count; t++) {
            const float *pixels = (const float *)&image[t * FREQUENCIES];
            float re = pixels[c], im = pixels[LANES + c];
            sum[t].re += re * k.re;
            sum[t].im += im * k.re;
            sum[t].re += im * k.im;
            sum[t].im -= re * k.im;
        }
    }
    UNROLLED for (int t = 0; t < count; t++) sums[t] = sum[t];
}

#define FOR_COUNT(n) \
    case n: add_products(n, present, image + first * FREQUENCIES + f, kernel + f, sums + f * count + first); break;

static void multiply_spectra(const Mixed *p, int64_t present, const Complex *image, const Complex *kernel, Complex *sums) {
    int64_t count = squares(p), each = steps_of(count, steps_of(count, MOST_SQUARES));
    for (int64_t f = 0; f < FREQUENCIES; f++)
        for (int64_t first = 0; first < count; first += each)
            switch (smaller(each, count - first)) {
                FOR_COUNT(1) FOR_COUNT(2) FOR_COUNT(3) FOR_COUNT(4) FOR_COUNT(5)
#if MOST_SQUARES == 10
                FOR_COUNT(6) FOR_COUNT(7) FOR_COUNT(8) FOR_COUNT(9) FOR_COUNT(10)
#endif
            }
}

static void slice_job(const void *problem, int64_t slice, float *work) {
    const Mixed *p = problem;
    Complex *image = (Complex *)work, *kernel = image + squares(p) * FREQUENCIES;
    vec *pixels = (vec *)(kernel + CHANNELS * FREQUENCIES);
    float *parts = (float *)(pixels + padded(p->height) * padded(p->width));
    Complex *sums = p->sums + slice * groups(p) * sums_size(p);
    int64_t blocks = steps_of(p->channels, CHANNELS);
    memset(sums, 0, groups(p) * sums_size(p) * sizeof *sums);
    for (int64_t block = slice * blocks / p->slices; block < (slice + 1) * blocks / p->slices; block++) {
        int64_t channel = block * CHANNELS, present = smaller(CHANNELS, p->channels - channel);
        copy_image(p, channel, present, pixels);
        image_spectra(p, pixels, image);
        copy_parts(p, channel, present, parts);
        for (int64_t group = 0; group < groups(p); group++) {
            kernel_spectra(p, group, channel, present, parts, kernel);
            multiply_spectra(p, present, image, kernel, sums + group * sums_size(p));
        }
    }
}

/* Add up the slices of LANES outputs of one square and leave the spectrum for the positions. */
static void square_job(const void *problem, int64_t job, float *work) {
    const Mixed *p = problem;
    int64_t count = squares(p), square = job % count, group = job / count, across = steps_of(p->width, HALF);
    Complex total[FREQUENCIES];
    vec found[HALF * HALF];
    (void)work;
    memset(total, 0, sizeof total);
    for (int64_t slice = 0; slice < p->slices; slice++)
        for (int64_t f = 0; f < FREQUENCIES; f++)
            total[f] = plus(total[f], p->sums[(slice * groups(p) + group) * sums_size(p) + f * count + square]);
    square_of(total, found);
    for (int64_t i = 0; i < HALF * HALF; i++) {
        int64_t r = square / across * HALF + i / HALF, c = square % across * HALF + i % HALF, output = group * LANES;
        if (r < p->height && c < p->width)
            store_channels(p->y, (r * p->width + c) * p->outputs + output, p->outputs - output, 0, found[i] * UNIT);
    }
}

/* y[r, c, o] = sum over i, j, channel of x[r + i − 4, c + j − 4, channel] · (base + weighted parts)[o, channel, i, j]. */
void mixed_run(const Mixed *problem, int threads, Parallel *parallel) {
    int64_t each = mixed_workspace(problem);
    if (squares(problem) == 0) return;
    run_jobs((Queue){slice_job, problem, problem->slices, problem->work, each, 0, 0}, threads, parallel);
    run_jobs((Queue){square_job, problem, squares(problem) * groups(problem), problem->work, each, 0, 0}, threads, parallel);
}
