/* 3×3 convolutions of maps and their gradients by Winograd's minimal filtering F(4×4, 3×3): a quarter of the products.
 *
 * The map is cut into tiles of 4×4 outputs, which see 6×6 inputs. Tiles and kernels are transformed to FREQUENCIES numbers each,
 * multiplied, summed over the channels and transformed back (Lavin and Gray, 2016). The gradient of the input is such a
 * convolution itself, with the kernels turned around; that of the weights is the same sum the other way around: over the tiles.
 *
 * Tiles are taken in runs of at most RUN, so that what a job adds to stays in its core's cache, and channels in chunks of at most
 * CHUNK, so that a run's transformed tiles, which every job reads, stay in the cache of all cores, and sums do not lose digits. A
 * sum's order depends only on the shapes: the result has the same bits for any number of threads.
 */
#include "../ops/jobs.h"
#include "../ops/vector.h"

#define TAPS 9
#define TILE 4
#define SEEN 6
#define FREQUENCIES (SEEN * SEEN)
#define RUN 64
#define VECTORS 2
#define OUTPUTS (VECTORS * LANES) /* of one job */
#define CHANNELS 32               /* summed at a time */
#define CHUNK (32 * CHANNELS)
#define GAP 16                    /* floats between frequencies, which else all lie at the same place of the cache */
#define IMAGE_STEP (RUN * CHANNELS + GAP)
#define KERNEL_STEP (CHANNELS * OUTPUTS + GAP)
#if LANES == 16
#define MOST_ROWS 12 /* of sums that are in registers at once */
#else
#define MOST_ROWS 5
#endif

typedef struct {
    int64_t images, height, width, channels, outputs;
    int64_t image, row, column;                /* strides of x, channels side by side */
    int64_t turned;                            /* whether the kernels are turned by 180° and their channels swapped */
    const float *x, *weight, *bias;            /* weights (outputs, channels, 3, 3), or (channels, outputs, 3, 3) where turned */
    float *y;                                  /* (images, height, width, outputs); bias (outputs) or NULL */
    float *gradient;                           /* of the weights, (outputs, channels, 3, 3), that of y is given; or NULL */
    float *transformed;                        /* winograd_transformed() floats, aligned to 64 bytes */
    float *work;                               /* threads × winograd_workspace() floats, aligned to 64 bytes */
} Convolution;

/* A convolution, and the run of tiles of one image and the chunk of channels, in blocks of CHANNELS, that are at hand. */
typedef struct {
    const Convolution *whole;
    int64_t image, first, tiles, block, blocks;
} Run;

static int64_t chunks(int64_t channels) { return steps_of(channels, CHUNK); }

/* Blocks of CHANNELS in a chunk. */
static int64_t chunk_blocks(int64_t channels) { return steps_of(steps_of(channels, CHANNELS), chunks(channels)); }

/* Floats of the transformed tiles of a run. */
int64_t winograd_transformed(int64_t channels) { return chunk_blocks(channels) * FREQUENCIES * IMAGE_STEP; }

/* Floats that one thread needs, a multiple of 16. */
int64_t winograd_workspace(void) { return FREQUENCIES * (KERNEL_STEP + RUN * OUTPUTS); }

/* The transforms multiply polynomials by their values at 0, ±√½, ±√2 and infinity, which loses a quarter of the digits that the
 * usual 0, ±1, ±2 lose: largest errors of 5e-6 instead of 1.3e-5 of the largest output at 768 and 1024 channels. An input far
 * above the others costs digits in its whole tile.
 */
#define ROOT_HALF 0.70710678f
#define ROOT_2 1.41421356f

/* Values at ±√½ and ±√2 from their even and odd parts, after the value at 0. */
INLINE void write_pairs(vec even, vec odd, vec wide, vec wide_odd, vec *out, int to) {
    out[to] = even + odd;
    out[2 * to] = even - odd;
    out[3 * to] = wide + wide_odd;
    out[4 * to] = wide - wide_odd;
}

/* Six numbers of the input → six in transformed form; `from` and `to` are distances in vectors. */
INLINE void transform_input(const vec *in, int from, vec *out, int to) {
    vec a = in[0], b = in[from], c = in[2 * from], d = in[3 * from], e = in[4 * from], f = in[5 * from];
    vec even = e - 2.0f * c, odd = ROOT_HALF * (d - 2.0f * b), wide = e - 0.5f * c, wide_odd = ROOT_2 * (d - 0.5f * b);
    out[0] = (a + e) - 2.5f * c;
    write_pairs(even, odd, wide, wide_odd, out, to);
    out[5 * to] = (b + f) - 2.5f * d;
}

/* Three taps → six. */
INLINE void transform_kernel(const vec *in, int from, vec *out, int to) {
    vec a = in[0], b = in[from], c = in[2 * from];
    vec even = (a + 0.5f * c) * (-1 / 1.5f), odd = b * (-ROOT_HALF / 1.5f), wide = (a + 2.0f * c) * (1 / 6.0f), wide_odd = b * (ROOT_2 / 6);
    out[0] = a;
    write_pairs(even, odd, wide, wide_odd, out, to);
    out[5 * to] = c;
}

/* The gradient of three taps from those of six. */
INLINE void transform_kernel_back(const vec *in, int from, vec *out, int to) {
    vec a = (in[from] + in[2 * from]) * (-1 / 1.5f), b = (in[from] - in[2 * from]) * (-ROOT_HALF / 1.5f);
    vec c = (in[3 * from] + in[4 * from]) * (1 / 6.0f), d = (in[3 * from] - in[4 * from]) * (ROOT_2 / 6);
    out[0] = in[0] + a + c;
    out[to] = b + d;
    out[2 * to] = 0.5f * a + 2.0f * c + in[5 * from];
}

/* Six transformed sums → four outputs. */
INLINE void transform_output(const vec *in, int from, vec *out, int to) {
    vec a = in[from] + in[2 * from], b = ROOT_HALF * (in[from] - in[2 * from]);
    vec c = in[3 * from] + in[4 * from], d = ROOT_2 * (in[3 * from] - in[4 * from]);
    out[0] = in[0] + a + c;
    out[to] = b + d;
    out[2 * to] = 0.5f * a + 2.0f * c;
    out[3 * to] = 0.5f * b + 2.0f * d + in[5 * from];
}

/* The gradient of six sums from that of four outputs. */
INLINE void transform_output_back(const vec *in, int from, vec *out, int to) {
    vec a = in[0], b = in[from], c = in[2 * from], d = in[3 * from];
    vec even = a + 0.5f * c, odd = ROOT_HALF * (b + 0.5f * d), wide = a + 2.0f * c, wide_odd = ROOT_2 * (b + 2.0f * d);
    out[0] = a;
    write_pairs(even, odd, wide, wide_odd, out, to);
    out[5 * to] = d;
}

/* Transform the run's tiles for CHANNELS channels: (FREQUENCIES, tiles, CHANNELS), zero outside the map. */
static void input_job(const void *problem, int64_t job, float *work) {
    const Run *run = problem;
    const Convolution *p = run->whole;
    int64_t channel = (run->block + job) * CHANNELS, across = steps_of(p->width, TILE);
    float *out = p->transformed + job * FREQUENCIES * IMAGE_STEP;
    (void)work;
    for (int64_t tile = 0; tile < run->tiles; tile++) {
        int64_t top = (run->first + tile) / across * TILE - 1, left = (run->first + tile) % across * TILE - 1;
        for (int64_t lane = 0; lane < CHANNELS; lane += LANES) {
            vec pixels[FREQUENCIES], half[FREQUENCIES];
            int64_t present = p->channels - channel - lane;
            for (int y = 0; y < SEEN; y++)
                for (int x = 0; x < SEEN; x++) {
                    int64_t r = top + y, c = left + x, at = run->image * p->image + r * p->row + c * p->column + channel + lane;
                    int inside = r >= 0 && r < p->height && c >= 0 && c < p->width && present > 0;
                    pixels[y * SEEN + x] = inside ? load_channels(p->x, at, present, 0) : (vec){0};
                }
            UNROLLED for (int y = 0; y < SEEN; y++) transform_input(pixels + y * SEEN, 1, half + y * SEEN, 1);
            UNROLLED for (int x = 0; x < SEEN; x++) transform_input(half + x, SEEN, pixels + x, SEEN);
            for (int f = 0; f < FREQUENCIES; f++) memcpy(out + f * IMAGE_STEP + tile * CHANNELS + lane, &pixels[f], sizeof(vec));
        }
    }
}

/* The taps of LANES channels' kernels, (LANES, TAPS) vectors over LANES outputs; zero where there are none. In memory the taps of
 * neighbouring channels lie side by side, so a square of LANES outputs and LANES taps of whatever channels is turned at once.
 */
static void load_taps(const Convolution *p, int64_t output, int64_t channel, vec *taps) {
    for (int part = 0; part < TAPS; part++) {
        int64_t at = channel * TAPS + part * LANES, present = p->channels * TAPS - at;
        for (int64_t i = 0; i < LANES; i++) {
            int inside = output + i < p->outputs && present > 0;
            vec none = {0};
            taps[part * LANES + i] = inside ? load_channels(p->weight, (output + i) * p->channels * TAPS + at, present, 0) : none;
        }
        transpose(taps + part * LANES);
    }
}

/* The same for turned kernels, whose taps of one channel lie side by side for neighbouring outputs, in the opposite order. */
static void load_turned_taps(const Convolution *p, int64_t output, int64_t channel, vec *taps) {
    for (int64_t i = 0; i < LANES; i++) {
        float line[TAPS * LANES] = {0};
        int64_t present = smaller(LANES, p->outputs - output);
        if (channel + i < p->channels && present > 0)
            memcpy(line, p->weight + ((channel + i) * p->outputs + output) * TAPS, present * TAPS * sizeof(float));
        for (int tap = 0; tap < TAPS; tap++)
            UNROLLED for (int lane = 0; lane < LANES; lane++) taps[i * TAPS + tap][lane] = line[lane * TAPS + TAPS - 1 - tap];
    }
}

/* Transform the kernels of LANES outputs and LANES channels: to (FREQUENCIES, CHANNELS, OUTPUTS), zero where there are none. */
static void transform_kernels(const Convolution *p, int64_t output, int64_t channel, float *out) {
    vec taps[TAPS * LANES];
    if (p->turned) load_turned_taps(p, output, channel, taps);
    else load_taps(p, output, channel, taps);
    for (int64_t c = 0; c < LANES; c++) {
        vec half[3 * SEEN], done[FREQUENCIES];
        UNROLLED for (int y = 0; y < 3; y++) transform_kernel(taps + c * TAPS + y * 3, 1, half + y * SEEN, 1);
        UNROLLED for (int x = 0; x < SEEN; x++) transform_kernel(half + x, SEEN, done + x, SEEN);
        for (int f = 0; f < FREQUENCIES; f++) memcpy(out + f * KERNEL_STEP + c * OUTPUTS, &done[f], sizeof(vec));
    }
}

/* sums (count, VECTORS) += Σ_k rows[i · row + k · step] · columns[k] over `length`; count and strides are constants where called. */
INLINE void add_products(
    int count, const float *rows, int row, int step, const float *columns, int64_t length, vec *sums) {
    vec sum[MOST_ROWS][VECTORS];
    UNROLLED for (int i = 0; i < count; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] = sums[i * VECTORS + v];
    for (int64_t k = 0; k < length; k++) {
        vec column[VECTORS];
        for (int v = 0; v < VECTORS; v++) memcpy(&column[v], columns + k * OUTPUTS + v * LANES, sizeof(vec));
        UNROLLED for (int i = 0; i < count; i++)
            for (int v = 0; v < VECTORS; v++) sum[i][v] += rows[i * row + k * step] * column[v];
    }
    UNROLLED for (int i = 0; i < count; i++)
        for (int v = 0; v < VECTORS; v++) sums[i * VECTORS + v] = sum[i][v];
}

#define FOR_COUNT(n) case n: add_products(n, rows, row, step, columns, length, sums); break;

/* The same for any count. */
INLINE void multiply(int64_t count, const float *rows, int row, int step, const float *columns, int64_t length, vec *sums) {
    int64_t each = steps_of(count, steps_of(count, MOST_ROWS));
    for (int64_t left = count; left > 0; left -= each, rows += each * row, sums += each * VECTORS)
        switch (smaller(each, left)) {
            FOR_COUNT(1) FOR_COUNT(2) FOR_COUNT(3) FOR_COUNT(4) FOR_COUNT(5)
#if MOST_ROWS == 12
            FOR_COUNT(6) FOR_COUNT(7) FOR_COUNT(8) FOR_COUNT(9) FOR_COUNT(10) FOR_COUNT(11) FOR_COUNT(12)
#endif
        }
}

/* Sums (FREQUENCIES, tiles, VECTORS) → the run's positions of y; chunks after the first add to them. */
static void write_outputs(const Run *run, int64_t output, const vec *sums) {
    const Convolution *p = run->whole;
    int64_t across = steps_of(p->width, TILE);
    for (int64_t tile = 0; tile < run->tiles; tile++) {
        int64_t top = (run->first + tile) / across * TILE, left = (run->first + tile) % across * TILE;
        for (int64_t v = 0; v < VECTORS && output + v * LANES < p->outputs; v++) {
            int64_t o = output + v * LANES;
            vec half[TILE * SEEN], done[TILE * TILE], bias = {0};
            if (p->bias != NULL && run->block == 0) bias = load_channels(p->bias, o, p->outputs - o, 0);
            UNROLLED for (int x = 0; x < SEEN; x++) {
                vec column[SEEN];
                for (int y = 0; y < SEEN; y++) column[y] = sums[((y * SEEN + x) * run->tiles + tile) * VECTORS + v];
                transform_output(column, 1, half + x, SEEN);
            }
            UNROLLED for (int y = 0; y < TILE; y++) transform_output(half + y * SEEN, 1, done + y * TILE, 1);
            for (int64_t y = 0; y < smaller(TILE, p->height - top); y++)
                for (int64_t x = 0; x < smaller(TILE, p->width - left); x++) {
                    int64_t at = ((run->image * p->height + top + y) * p->width + left + x) * p->outputs + o;
                    vec before = run->block == 0 ? bias : load_channels(p->y, at, p->outputs - o, 0);
                    store_channels(p->y, at, p->outputs - o, 0, done[y * TILE + x] + before);
                }
        }
    }
}

/* OUTPUTS outputs of a run. */
static void output_job(const void *problem, int64_t job, float *work) {
    const Run *run = problem;
    const Convolution *p = run->whole;
    float *kernels = work;
    vec *sums = (vec *)(work + FREQUENCIES * KERNEL_STEP);
    memset(sums, 0, FREQUENCIES * run->tiles * OUTPUTS * sizeof(float));
    for (int64_t block = 0; block < run->blocks; block++) {
        int64_t channel = (run->block + block) * CHANNELS;
        for (int64_t o = 0; o < OUTPUTS; o += LANES)
            for (int64_t c = 0; c < CHANNELS; c += LANES)
                transform_kernels(p, job * OUTPUTS + o, channel + c, kernels + c * OUTPUTS + o);
        const float *tiles = p->transformed + block * FREQUENCIES * IMAGE_STEP;
        for (int f = 0; f < FREQUENCIES; f++)
            multiply(
                run->tiles, tiles + f * IMAGE_STEP, CHANNELS, 1, kernels + f * KERNEL_STEP, CHANNELS,
                sums + f * run->tiles * VECTORS);
    }
    write_outputs(run, job * OUTPUTS, sums);
}

/* Transform the gradients of OUTPUTS outputs of the run's tiles: (FREQUENCIES, tiles, OUTPUTS). */
static void transform_gradients(const Run *run, int64_t output, vec *out) {
    const Convolution *p = run->whole;
    int64_t across = steps_of(p->width, TILE);
    for (int64_t tile = 0; tile < run->tiles; tile++) {
        int64_t top = (run->first + tile) / across * TILE, left = (run->first + tile) % across * TILE;
        for (int64_t v = 0; v < VECTORS; v++) {
            vec given[TILE * TILE], half[TILE * SEEN], done[FREQUENCIES];
            int64_t o = output + v * LANES;
            for (int64_t i = 0; i < TILE * TILE; i++) {
                int64_t r = top + i / TILE, c = left + i % TILE, at = ((run->image * p->height + r) * p->width + c) * p->outputs + o;
                int inside = r < p->height && c < p->width && o < p->outputs;
                given[i] = inside ? load_channels(p->y, at, p->outputs - o, 0) : (vec){0};
            }
            UNROLLED for (int y = 0; y < TILE; y++) transform_output_back(given + y * TILE, 1, half + y * SEEN, 1);
            UNROLLED for (int x = 0; x < SEEN; x++) transform_output_back(half + x, SEEN, done + x, SEEN);
            for (int f = 0; f < FREQUENCIES; f++) out[(f * run->tiles + tile) * VECTORS + v] = done[f];
        }
    }
}

/* Add what the sums (FREQUENCIES, CHANNELS, VECTORS) say to the gradient of LANES outputs' weights for LANES channels. */
static void add_gradients(const Convolution *p, int64_t output, int64_t channel, const vec *sums) {
    vec taps[TAPS * LANES];
    for (int64_t c = 0; c < LANES; c++) {
        vec half[3 * SEEN];
        UNROLLED for (int x = 0; x < SEEN; x++)
            transform_kernel_back(sums + (x * CHANNELS + c) * VECTORS, SEEN * CHANNELS * VECTORS, half + x, SEEN);
        UNROLLED for (int y = 0; y < 3; y++) transform_kernel_back(half + y * SEEN, 1, taps + c * TAPS + y * 3, 1);
    }
    for (int part = 0; part < TAPS; part++) {
        int64_t start = channel * TAPS + part * LANES, present = p->channels * TAPS - start;
        transpose(taps + part * LANES);
        for (int64_t i = 0; present > 0 && i < smaller(LANES, p->outputs - output); i++) {
            int64_t at = (output + i) * p->channels * TAPS + start;
            store_channels(p->gradient, at, present, 0, load_channels(p->gradient, at, present, 0) + taps[part * LANES + i]);
        }
    }
}

/* What a run adds to the gradient of OUTPUTS outputs' weights. */
static void gradient_job(const void *problem, int64_t job, float *work) {
    const Run *run = problem;
    const Convolution *p = run->whole;
    vec *sums = (vec *)work, *given = (vec *)(work + FREQUENCIES * KERNEL_STEP);
    transform_gradients(run, job * OUTPUTS, given);
    for (int64_t block = 0; block < run->blocks; block++) {
        int64_t channel = (run->block + block) * CHANNELS;
        const float *tiles = p->transformed + block * FREQUENCIES * IMAGE_STEP;
        memset(sums, 0, FREQUENCIES * CHANNELS * OUTPUTS * sizeof(float));
        for (int f = 0; f < FREQUENCIES; f++) {
            const float *columns = (const float *)(given + f * run->tiles * VECTORS);
            multiply(CHANNELS, tiles + f * IMAGE_STEP, 1, CHANNELS, columns, run->tiles, sums + f * CHANNELS * VECTORS);
        }
        for (int64_t v = 0; v < VECTORS && job * OUTPUTS + v * LANES < p->outputs; v++)
            for (int64_t c = 0; c < CHANNELS && channel + c < p->channels; c += LANES)
                add_gradients(p, job * OUTPUTS + v * LANES, channel + c, sums + c * VECTORS + v);
    }
}

/* A run of tiles: what it adds to the output, or to the gradient of the weights, chunk by chunk. */
static void work_off_run(Run run, int threads, Parallel *parallel) {
    const Convolution *p = run.whole;
    void (*job)(const void *, int64_t, float *) = p->gradient == NULL ? output_job : gradient_job;
    int64_t all = steps_of(p->channels, CHANNELS), each = winograd_workspace();
    for (; run.block < all; run.block += run.blocks) {
        run.blocks = smaller(chunk_blocks(p->channels), all - run.block);
        run_jobs((Queue){input_job, &run, run.blocks, p->work, each, 0, 0}, threads, parallel);
        run_jobs((Queue){job, &run, steps_of(p->outputs, OUTPUTS), p->work, each, 0, 0}, threads, parallel);
    }
}

/* y = x * weight + bias, zeros around the map, or what x and the gradient y add to that of the weights. At most MOST_THREADS. */
void winograd_run(const Convolution *p, int threads, Parallel *parallel) {
    int64_t tiles = steps_of(p->height, TILE) * steps_of(p->width, TILE);
    if (tiles == 0) return;
    int64_t length = steps_of(tiles, steps_of(tiles, RUN));
    for (int64_t image = 0; image < p->images; image++)
        for (int64_t first = 0; first < tiles; first += length)
            work_off_run((Run){p, image, first, smaller(length, tiles - first), 0, 0}, threads, parallel);
}
