/* Products of float32 matrices, C = A·B with a bias per column, for a batch of them in one call.
 *
 * A job makes a block of C. It takes the sums DEPTH terms at a time: the block's columns of B are copied into panels of COLUMNS
 * columns, which stay in the second cache, then its rows of A into panels of ROWS rows, one after the other (several at a time
 * where rows lie side by side: whole cache lines once). Copying absorbs how the matrices lie in memory. The order of a sum
 * depends only on its length: the result has the same bits for any number of threads and any division into jobs.
 */
#include "../ops/jobs.h"
#include "../ops/vector.h"

#define DEPTH 384
#define VECTORS 2
#define COLUMNS (VECTORS * LANES)
#if LANES == 16
#define ROWS 12 /* of sums that are in registers at once */
#else
#define ROWS 6
#endif
#define GROUP 16 /* panels that are copied at a time from rows side by side */
#define AHEAD 4  /* terms before they are copied they are asked for */
#define LINE 16  /* floats of a cache line */
#define GAP 16   /* floats between panels' parts, which else all lie at the same place of the cache */
#define ROW_STEP (DEPTH + GAP)
#define ROW_PANEL (ROWS * ROW_STEP)
#define COLUMN_PANEL (DEPTH * COLUMNS + GAP)

/* (batch, rows, columns) by its strides, one of the last two of which is 1. */
typedef struct {
    const float *data;
    int64_t batch, row, column;
} Matrix;

typedef struct {
    int64_t batch, rows, columns, depth;
    int64_t block_rows, block_columns; /* of a job */
    Matrix a, b;                       /* (batch, rows, depth), (batch, depth, columns) */
    const float *bias;                 /* (batch, columns) or NULL */
    float *c;                          /* (batch, rows, columns) */
    float *work;                       /* threads × matrix_workspace() floats, aligned to 64 bytes */
} Product;

typedef vec Tile[ROWS][VECTORS];

/* DEPTH terms of the sums of a block of C, rows × columns. The matrices start where the block does, at the first of the terms. */
typedef struct {
    Matrix a, b;
    int64_t rows, columns, depth;
    const float *bias; /* or NULL */
    float *c;
    int64_t c_row;
    int added; /* to the terms before these */
    float *row_panels, *column_panels;
} Block;

/* Floats that one thread needs, a multiple of 16. */
int64_t matrix_workspace(int64_t block_columns) { return GROUP * ROW_PANEL + steps_of(block_columns, COLUMNS) * COLUMN_PANEL; }

/* Whether the rows of a matrix lie side by side, not its columns. */
INLINE int lies_turned(const Matrix *m) { return m->column != 1; }

/* LANES × LANES numbers of B, of which `rows` × `columns` exist, the others zero. */
INLINE void load_square(const Matrix *b, const float *from, int64_t rows, int64_t columns, vec *square) {
    int64_t lines = lies_turned(b) ? columns : rows, length = lies_turned(b) ? rows : columns;
    int64_t step = lies_turned(b) ? b->column : b->row;
    for (int64_t i = 0; i < LANES; i++) square[i] = i < lines ? load_channels(from, i * step, length, 0) : (vec){0};
    if (lies_turned(b)) transpose(square);
}

/* `depth` rows and `columns` columns of B → panels (DEPTH, COLUMNS), zero where there are no columns. */
static void copy_columns(const Matrix *b, int64_t depth, int64_t columns, float *panels) {
    int64_t across = steps_of(columns, COLUMNS) * VECTORS, down = steps_of(depth, LANES);
    for (int64_t i = 0; i < across * down; i++) { /* in the order of memory */
        int64_t k = (lies_turned(b) ? i % down : i / across) * LANES, j = (lies_turned(b) ? i / down : i % across) * LANES;
        float *to = panels + j / COLUMNS * COLUMN_PANEL + k * COLUMNS + j % COLUMNS;
        vec square[LANES];
        load_square(b, b->data + k * b->row + j * b->column, depth - k, columns - j, square);
        for (int64_t l = 0; l < smaller(LANES, depth - k); l++) memcpy(to + l * COLUMNS, &square[l], sizeof(vec));
    }
}

/* `rows` rows of A, side by side in memory → panels (DEPTH, ROWS), zero where there are no rows. */
static void copy_turned_rows(const Matrix *a, const float *from, int64_t rows, int64_t depth, float *panels) {
    if (rows % ROWS > 0) memset(panels + rows / ROWS * ROW_PANEL, 0, depth * ROWS * sizeof(float));
    for (int64_t k = 0; k < depth; k++, from += a->column) {
        if (k + AHEAD < depth)
            for (int64_t i = 0; i < rows; i += LINE) __builtin_prefetch(from + AHEAD * a->column + i);
        for (int64_t i = 0; i < rows; i += ROWS) {
            float *to = panels + i / ROWS * ROW_PANEL + k * ROWS;
            if (i + ROWS <= rows) memcpy(to, from + i, ROWS * sizeof(float));
            else memcpy(to, from + i, (rows - i) * sizeof(float));
        }
    }
}

/* `rows` rows of A, one after the other in memory → a panel (ROWS, ROW_STEP), zero where there are no rows. */
static void copy_rows(const Matrix *a, const float *from, int64_t rows, int64_t depth, float *panel) {
    if (rows < ROWS) memset(panel, 0, ROW_PANEL * sizeof(float));
    for (int64_t i = 0; i < rows; i++) memcpy(panel + i * ROW_STEP, from + i * a->row, depth * sizeof(float));
}

/* Ask for LINE terms of ROWS rows that lie `row` apart. */
INLINE void fetch_rows(const float *rows, int64_t row) {
    for (int64_t i = 0; i < ROWS; i++) __builtin_prefetch(rows + i * row);
}

/* Σ_k rows[i · row + k · step] · columns[k]; strides and the number of vectors are constants where called.
 * Meanwhile rows at `next`, if not NULL, `next_row` apart, are asked for.
 */
INLINE void multiply(
    int vectors, const float *rows, int row, int step, const float *columns, int64_t depth, const float *next, int64_t next_row,
    Tile sums) {
    Tile sum;
    UNROLLED for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = (vec){0};
    for (int64_t first = 0; first < depth; first += LINE) {
        if (next != NULL) fetch_rows(next + first, next_row);
        for (int64_t k = first; k < smaller(first + LINE, depth); k++) {
            vec column[VECTORS];
            for (int v = 0; v < vectors; v++) memcpy(&column[v], columns + k * COLUMNS + v * LANES, sizeof(vec));
            UNROLLED for (int i = 0; i < ROWS; i++)
                for (int v = 0; v < vectors; v++) sum[i][v] += rows[i * row + k * step] * column[v];
        }
    }
    UNROLLED for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < vectors; v++) sums[i][v] = sum[i][v];
}

INLINE void fetch_tile(const float *c, int64_t row, int64_t rows) {
    for (int64_t i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++) __builtin_prefetch(c + i * row + v * LANES, 1);
}

/* C = bias + sums, or C += sums, in `rows` rows from (row, column) on. */
INLINE void write_tile(const Block *block, int64_t row, int64_t column, int64_t rows, Tile sums) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t v = 0, j = column; v < VECTORS && j < block->columns; v++, j += LANES) {
            int64_t present = block->columns - j, at = (row + i) * block->c_row + j;
            vec start = {0};
            if (block->added) start = load_channels(block->c, at, present, 0);
            else if (block->bias != NULL) start = load_channels(block->bias, j, present, 0);
            store_channels(block->c, at, present, 0, start + sums[i][v]);
        }
}

/* ROWS rows of the block, `row` on, from a panel; `turned` is a constant where called. `next`: rows to ask for, or NULL. */
INLINE void multiply_rows(const Block *block, int turned, int64_t row, const float *row_panel, const float *next) {
    int row_step = turned ? 1 : ROW_STEP, step = turned ? ROWS : 1;
    int64_t rows = smaller(ROWS, block->rows - row), depth = block->depth;
    for (int64_t j = 0; j < block->columns; j += COLUMNS, next = NULL) {
        const float *columns = block->column_panels + j / COLUMNS * COLUMN_PANEL;
        Tile sums = {{{0}}};
        fetch_tile(block->c + row * block->c_row + j, block->c_row, rows);
        if (j + LANES < block->columns) multiply(2, row_panel, row_step, step, columns, depth, next, block->a.row, sums);
        else multiply(1, row_panel, row_step, step, columns, depth, next, block->a.row, sums);
        write_tile(block, row, j, rows, sums);
    }
}

static void multiply_block(const Block *block) {
    const Matrix *a = &block->a;
    copy_columns(&block->b, block->depth, block->columns, block->column_panels);
    for (int64_t i = 0; i < block->rows; i += ROWS) {
        const float *rows = a->data + i * a->row;
        int64_t left = block->rows - i, panel = i / ROWS % GROUP;
        if (lies_turned(a)) {
            if (panel == 0) copy_turned_rows(a, rows, smaller(GROUP * ROWS, left), block->depth, block->row_panels);
            multiply_rows(block, 1, i, block->row_panels + panel * ROW_PANEL, NULL);
        } else {
            copy_rows(a, rows, smaller(ROWS, left), block->depth, block->row_panels);
            multiply_rows(block, 0, i, block->row_panels, left >= 2 * ROWS ? rows + ROWS * a->row : NULL);
        }
    }
}

static void block_job(const void *problem, int64_t job, float *work) {
    const Product *p = problem;
    int64_t across = steps_of(p->columns, p->block_columns), down = steps_of(p->rows, p->block_rows);
    int64_t batch = job / (across * down), top = job / across % down * p->block_rows, left = job % across * p->block_columns;
    Block block = {p->a, p->b, smaller(p->block_rows, p->rows - top), smaller(p->block_columns, p->columns - left)};
    block.a.data += batch * p->a.batch + top * p->a.row;
    block.b.data += batch * p->b.batch + left * p->b.column;
    block.bias = p->bias == NULL ? NULL : p->bias + batch * p->columns + left;
    block.c = p->c + (batch * p->rows + top) * p->columns + left;
    block.c_row = p->columns;
    block.row_panels = work;
    block.column_panels = work + GROUP * ROW_PANEL;
    int64_t each = steps_of(p->depth, steps_of(p->depth, DEPTH));
    for (int64_t first = 0; first < p->depth; first += each) {
        block.depth = smaller(each, p->depth - first);
        block.added = first > 0;
        multiply_block(&block);
        block.a.data += each * p->a.column;
        block.b.data += each * p->b.row;
    }
}

/* Sizes above zero; at most MOST_THREADS. */
void matrix_run(const Product *p, int threads, Parallel *parallel) {
    int64_t jobs = p->batch * steps_of(p->rows, p->block_rows) * steps_of(p->columns, p->block_columns);
    run_jobs((Queue){block_job, p, jobs, p->work, matrix_workspace(p->block_columns), 0, 0}, threads, parallel);
}
