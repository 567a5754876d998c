/* A head behind the taps of its 3×3 convolution: interpolation, normalisation, GELU, 1×1 convolution, without the large map.
 *
 * `small` holds the nine taps' products per position of the small map. A row of the large map is a sum of TERMS of its rows and
 * taps, first down, then across; it is made in the cache whenever it is needed: for the statistics, for the logits, and twice for
 * the gradients. Channels are taken LANES at a time. Each job writes to its own part of the result, and their split depends only
 * on the shapes: the result has the same bits for any number of threads.
 */
#include "../ops/jobs.h"
#include "../ops/vector.h"

#define GROUP 16 /* channels that lie side by side in `small` */
#define TAPS 9
#define TERMS 6 /* of a bilinear interpolation and three taps, along one axis */
#define BAND 4  /* rows of a job of logits */

/* The large map is (tall, wide). Tables: of every large row the small rows · 3 + kernel rows it is the sum of, and their shares;
 * columns likewise; and of every small column · 3 + kernel column the large columns it goes to.
 */
typedef struct {
    int64_t images, height, width, tall, wide, channels, outputs, spread;
    const int32_t *row_from, *column_from, *column_to;    /* (tall, TERMS), (wide, TERMS), (width · 3, spread) */
    const float *row_share, *column_share, *column_given; /* of the same shapes */
    const float *small;           /* (images, height · width, channels / GROUP, 9, GROUP) */
    const float *factor, *shift;  /* (channels): GELU sees factor · map + shift */
    const float *predict, *bias;  /* (outputs, channels), (outputs) */
    float *logits;                /* (images, outputs, tall, wide) */
    double *mean, *squares;       /* (images, channels): mean, and sum of squares around it */
    const float *dlogits;         /* (images, tall, wide, outputs) */
    const float *centre, *scale;  /* (channels): the normalised map is (map − centre) · scale */
    const float *slope, *drift;   /* (channels): averages of dz · normalised map and of dz, the gradient of GELU's input */
    float *dshift, *dfactor;      /* (images, channels): sums of dz and of dz · normalised map */
    float *dpredict;              /* (images, outputs, channels) */
    float *dsmall;                /* as small */
    float *work;                  /* threads × head_workspace() floats, aligned to 64 bytes */
} Head;

static int64_t padded_width(const Head *p) { return steps_of(p->wide, LANES) * LANES; }

static int64_t pixel(const Head *p) { return TAPS * p->channels; }

/* Floats that one thread needs, a multiple of 16. */
int64_t head_workspace(const Head *p) {
    int64_t rows = LANES * (6 * p->width + 3 * padded_width(p) + 2 * p->outputs);
    int64_t tile = p->outputs * BAND * padded_width(p), map = p->height * p->width * TAPS * LANES;
    return steps_of(rows + (tile > map ? tile : map), 16) * 16;
}

INLINE vec load_vec(const float *at) {
    vec value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE void store_vec(float *at, vec value) { memcpy(at, &value, sizeof value); }

/* Where the channels from `first` on begin in the products of an image's first position. */
static int64_t channels_at(const Head *p, int64_t image, int64_t first) {
    return image * p->height * p->width * pixel(p) + first / GROUP * TAPS * GROUP + first % GROUP;
}

/* One row of the large map for LANES channels whose products start at `small`; `columns` is scratch, (width · 3). */
static void large_row(const Head *p, const float *small, int64_t row, vec *columns, vec *out) {
    const float *from[TERMS], *share = p->row_share + row * TERMS;
    for (int i = 0; i < TERMS; i++) {
        int64_t place = p->row_from[row * TERMS + i];
        from[i] = small + place / 3 * p->width * pixel(p) + place % 3 * 3 * GROUP;
    }
    for (int64_t x = 0; x < p->width; x++)
        UNROLLED for (int k = 0; k < 3; k++) {
            vec sum = {0};
            UNROLLED for (int i = 0; i < TERMS; i++) sum += share[i] * load_vec(from[i] + x * pixel(p) + k * GROUP);
            columns[x * 3 + k] = sum;
        }
    for (int64_t x = 0; x < p->wide; x++) {
        const int32_t *column = p->column_from + x * TERMS;
        vec sum = {0};
        UNROLLED for (int i = 0; i < TERMS; i++) sum += p->column_share[x * TERMS + i] * columns[column[i]];
        out[x] = sum;
    }
}

/* Standard normal distribution: Φ(z), absolute error 2e-7, and in *density its derivative. */
INLINE vec normal(vec z, vec *density) {
    vec size = select_vec(z < 0.0f, -z, z), t = 1.0f / (1.0f + 0.3f * size), e = exp2_vec(z * z * -0.72134752f);
    vec p = splat(0.0356747808f); /* of Φ(−|z|) = e · polynomial(t) */
    p = p * t - 0.157203109f;
    p = p * t + 0.206353549f;
    p = p * t - 0.0536836805f;
    p = p * t + 0.128561644f;
    p = p * t + 0.0999134872f;
    p = p * t + 0.120753957f;
    p = p * t + 0.119629299f;
    vec tail = e * (p * t);
    *density = e * 0.39894228f;
    return select_vec(z > 0.0f, 1.0f - tail, tail);
}

INLINE vec gelu(vec z) {
    vec density;
    return z * normal(z, &density);
}

static int64_t channel_vectors(const Head *p) { return p->channels / LANES; }

static int64_t channel_jobs(const Head *p) { return p->images * channel_vectors(p); }

/* Sums of differences around the mean of the rows taken so far, and that mean. */
typedef struct {
    double mean[LANES], squares[LANES];
} Statistics;

/* Takes in row `y`: its squares are summed around its own mean, so that neither an offset nor another row costs them digits. */
static void add_row(const Head *p, const vec *row, int64_t y, Statistics *so_far) {
    vec sum[2] = {{0}}, rest[2] = {{0}}, square[2] = {{0}};
    for (int64_t x = 0; x < p->wide; x++) sum[x % 2] += row[x];
    vec origin = (sum[0] + sum[1]) / (float)p->wide;
    for (int64_t x = 0; x < p->wide; x++) {
        vec difference = row[x] - origin;
        rest[x % 2] += difference;
        square[x % 2] += difference * difference;
    }
    for (int c = 0; c < LANES; c++) { /* the row's mean is its origin but for rounding */
        double off = ((double)rest[0][c] + rest[1][c]) / p->wide, step = origin[c] + off - so_far->mean[c];
        double squares = (double)square[0][c] + square[1][c] - off * off * p->wide;
        so_far->mean[c] += step / (y + 1);
        so_far->squares[c] += squares + step * step * p->wide * y / (y + 1);
    }
}

/* Mean and squares of LANES channels of one image. */
static void statistics_job(const void *problem, int64_t job, float *work) {
    const Head *p = problem;
    int64_t image = job / channel_vectors(p), first = job % channel_vectors(p) * LANES;
    vec *columns = (vec *)work, *row = columns + 3 * p->width;
    Statistics statistics = {{0}, {0}};
    for (int64_t y = 0; y < p->tall; y++) {
        large_row(p, p->small + channels_at(p, image, first), y, columns, row);
        add_row(p, row, y, &statistics);
    }
    memcpy(p->mean + image * p->channels + first, statistics.mean, sizeof statistics.mean);
    memcpy(p->squares + image * p->channels + first, statistics.squares, sizeof statistics.squares);
}

static int64_t bands(const Head *p) { return steps_of(p->tall, BAND); }

static int64_t logits_jobs(const Head *p) { return p->images * bands(p); }

/* Adds to the logits of one row (outputs, BAND rows apart) what LANES channels give. */
static void predict_row(const Head *p, const vec *row, int64_t first, float *tile) {
    vec factor = load_vec(p->factor + first), shift = load_vec(p->shift + first);
    for (int64_t x = 0; x < padded_width(p); x += LANES) {
        vec rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = gelu(row[x + i] * factor + shift);
        transpose(rows);
        for (int64_t o = 0; o < p->outputs; o++) {
            const float *weights = p->predict + o * p->channels + first;
            float *at = tile + o * BAND * padded_width(p) + x;
            vec sums[4] = {load_vec(at), {0}, {0}, {0}};
            UNROLLED for (int i = 0; i < LANES; i++) sums[i % 4] += weights[i] * rows[i];
            store_vec(at, (sums[0] + sums[1]) + (sums[2] + sums[3]));
        }
    }
}

static void logits_job(const void *problem, int64_t job, float *work) {
    const Head *p = problem;
    int64_t image = job / bands(p), start = job % bands(p) * BAND, rows = smaller(BAND, p->tall - start);
    vec *columns = (vec *)work, *row = columns + 3 * p->width;
    float *tile = (float *)(row + padded_width(p));
    for (int64_t o = 0; o < p->outputs; o++)
        for (int64_t i = 0; i < BAND * padded_width(p); i++) tile[o * BAND * padded_width(p) + i] = p->bias[o];
    for (int64_t x = p->wide; x < padded_width(p); x++) row[x] = (vec){0};
    for (int64_t first = 0; first < p->channels; first += LANES)
        for (int64_t y = 0; y < rows; y++) {
            large_row(p, p->small + channels_at(p, image, first), start + y, columns, row);
            predict_row(p, row, first, tile + y * padded_width(p));
        }
    for (int64_t o = 0; o < p->outputs; o++)
        for (int64_t y = 0; y < rows; y++)
            memcpy(p->logits + ((image * p->outputs + o) * p->tall + start + y) * p->wide,
                   tile + (o * BAND + y) * padded_width(p), p->wide * sizeof(float));
}

/* What the gradients of one row need: scratch and the channels' numbers. */
typedef struct {
    vec *columns, *row, *active, *dz, *predict, *dcolumns;
    vec centre, scale, factor, shift;
    int64_t first;
} Tile;

static Tile tile_of(const Head *p, int64_t first, float *work) {
    vec *v = (vec *)work;
    Tile tile = {.columns = v, .row = v + 3 * p->width, .first = first};
    tile.active = tile.row + padded_width(p);
    tile.dz = tile.active + padded_width(p);
    tile.predict = tile.dz + padded_width(p);
    tile.dcolumns = tile.predict + p->outputs;
    for (int64_t o = 0; o < p->outputs; o++) tile.predict[o] = load_vec(p->predict + o * p->channels + first);
    tile.centre = load_vec(p->centre + first);
    tile.scale = load_vec(p->scale + first);
    tile.factor = load_vec(p->factor + first);
    tile.shift = load_vec(p->shift + first);
    return tile;
}

/* One row: the normalised map (map − centre) · scale in place of the map, GELU's output and the gradient dz of its input. */
static void gradient_row(const Head *p, const Tile *tile, int64_t image, int64_t y) {
    const float *given = p->dlogits + (image * p->tall + y) * p->wide * p->outputs;
    large_row(p, p->small + channels_at(p, image, tile->first), y, tile->columns, tile->row);
    for (int64_t x = 0; x < p->wide; x++, given += p->outputs) {
        vec z = tile->row[x] * tile->factor + tile->shift, density, below = normal(z, &density), sums[2] = {{0}};
        int64_t o = 0;
        for (; o + 1 < p->outputs; o += 2) {
            sums[0] += given[o] * tile->predict[o];
            sums[1] += given[o + 1] * tile->predict[o + 1];
        }
        if (o < p->outputs) sums[0] += given[o] * tile->predict[o];
        tile->active[x] = z * below;
        tile->dz[x] = (sums[0] + sums[1]) * (below + z * density);
        tile->row[x] = (tile->row[x] - tile->centre) * tile->scale;
    }
}

/* Adds one row's outer products, which are summed by themselves to keep their digits, to the gradients of `count` outputs' weights. */
INLINE void weight_sums(const Head *p, const Tile *tile, const float *given, int count, vec *sums) {
    vec own[4] = {{0}};
    for (int64_t x = 0; x < p->wide; x++, given += p->outputs) {
        vec active = tile->active[x];
        UNROLLED for (int i = 0; i < count; i++) own[i] += given[i] * active;
    }
    for (int i = 0; i < count; i++) sums[i] += own[i];
}

/* The sums over one image that the gradients need, of LANES channels. */
static void sums_job(const void *problem, int64_t job, float *work) {
    const Head *p = problem;
    int64_t image = job / channel_vectors(p), first = job % channel_vectors(p) * LANES;
    Tile tile = tile_of(p, first, work);
    vec shift = {0}, factor = {0}, *weights = tile.dcolumns;
    for (int64_t o = 0; o < p->outputs; o++) weights[o] = (vec){0};
    for (int64_t y = 0; y < p->tall; y++) {
        const float *given = p->dlogits + (image * p->tall + y) * p->wide * p->outputs;
        vec row_shift[2] = {{0}}, row_factor[2] = {{0}};
        gradient_row(p, &tile, image, y);
        for (int64_t x = 0; x < p->wide; x++) {
            row_shift[x % 2] += tile.dz[x];
            row_factor[x % 2] += tile.dz[x] * tile.row[x];
        }
        shift += row_shift[0] + row_shift[1];
        factor += row_factor[0] + row_factor[1];
        int64_t o = 0;
        for (; o + 4 <= p->outputs; o += 4) weight_sums(p, &tile, given + o, 4, weights + o);
        for (; o < p->outputs; o++) weight_sums(p, &tile, given + o, 1, weights + o);
    }
    store_vec(p->dshift + image * p->channels + first, shift);
    store_vec(p->dfactor + image * p->channels + first, factor);
    for (int64_t o = 0; o < p->outputs; o++) store_vec(p->dpredict + (image * p->outputs + o) * p->channels + first, weights[o]);
}

/* Adds a row of the large map's gradient to that of the products (height · width, 9), along both axes backwards. */
static void spread_row(const Head *p, const Tile *tile, int64_t row, vec *dsmall) {
    for (int64_t j = 0; j < p->width * 3; j++) {
        const int32_t *to = p->column_to + j * p->spread;
        const float *share = p->column_given + j * p->spread;
        vec sums[2] = {{0}};
        for (int64_t i = 0; i < p->spread; i++) sums[i % 2] += share[i] * tile->dz[to[i]];
        tile->dcolumns[j] = sums[0] + sums[1];
    }
    for (int i = 0; i < TERMS; i++) {
        float share = p->row_share[row * TERMS + i];
        int64_t place = p->row_from[row * TERMS + i];
        vec *to = dsmall + place / 3 * p->width * TAPS + place % 3 * 3;
        if (share == 0.0f) continue;
        for (int64_t x = 0; x < p->width; x++)
            UNROLLED for (int k = 0; k < 3; k++) to[x * TAPS + k] += share * tile->dcolumns[x * 3 + k];
    }
}

/* The gradient of the products of LANES channels of one image. That of the map is factor · (dz − drift − normalised · slope). */
static void products_job(const void *problem, int64_t job, float *work) {
    const Head *p = problem;
    int64_t image = job / channel_vectors(p), first = job % channel_vectors(p) * LANES, positions = p->height * p->width;
    Tile tile = tile_of(p, first, work);
    vec slope = load_vec(p->slope + first), drift = load_vec(p->drift + first);
    vec *dsmall = tile.dcolumns + (3 * p->width > p->outputs ? 3 * p->width : p->outputs);
    memset(dsmall, 0, positions * TAPS * sizeof(vec));
    for (int64_t y = 0; y < p->tall; y++) {
        gradient_row(p, &tile, image, y);
        for (int64_t x = 0; x < p->wide; x++) tile.dz[x] = tile.factor * (tile.dz[x] - drift - tile.row[x] * slope);
        spread_row(p, &tile, y, dsmall);
    }
    float *out = p->dsmall + channels_at(p, image, first);
    for (int64_t i = 0; i < positions; i++, out += pixel(p))
        for (int k = 0; k < TAPS; k++) store_vec(out + k * GROUP, dsmall[i * TAPS + k]);
}

enum Pass { STATISTICS, LOGITS, SUMS, PRODUCTS };

void head_run(const Head *p, enum Pass pass, int threads, Parallel *parallel) {
    void (*job[])(const void *, int64_t, float *) = {statistics_job, logits_job, sums_job, products_job};
    int64_t jobs = pass == LOGITS ? logits_jobs(p) : channel_jobs(p);
    run_jobs((Queue){job[pass], p, jobs, p->work, head_workspace(p), 0, 0}, threads, parallel);
}
