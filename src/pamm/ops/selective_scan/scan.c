/* The selective scan on a CPU, forward and backward: plain C11 with the vector extensions of GCC and Clang.
 *
 * LANES neighbouring channels share a vector. States are taken in small blocks that stay in registers. For one block of
 * channels and states, E[l, n] = exp(delta[l] A[n]) is computed once per position and read by every order through the order's
 * index, so nothing is permuted.
 *
 * Jobs write to places of their own and the split into jobs depends on the shapes alone: the result has the same bits for any
 * number of threads.
 */
#include "scan_forward.h"
#include "scan_backward.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

/* Floats that one thread needs, a multiple of 16. */
int64_t scan_workspace(int64_t length) {
    int64_t forward = forward_workspace(length), backward = backward_workspace(length);
    return ((forward > backward ? forward : backward) + 15) / 16 * 16;
}

/* Floats of `parts`. */
int64_t scan_parts(const Problem *problem) { return backward_jobs(problem) * slice_parts(problem); }

int scan_lanes(void) { return LANES; }

/* Ask for large pages: one visit after the other touches as many small pages as there are positions. */
void scan_use_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

typedef struct {
    const Problem *problem;
    void (*job)(const Problem *, int64_t, float *);
    int64_t jobs;
    atomic_llong next_job, next_worker;
} Queue;

/* What every thread runs: takes a workspace, then jobs until none is left. */
static void work_off(void *argument) {
    Queue *queue = argument;
    float *work = queue->problem->work + atomic_fetch_add(&queue->next_worker, 1) * scan_workspace(queue->problem->length);
    for (int64_t job; (job = atomic_fetch_add(&queue->next_job, 1)) < queue->jobs;) queue->job(queue->problem, job, work);
}

static void *start_thread(void *argument) {
    work_off(argument);
    return NULL;
}

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

static void run_jobs(Queue queue, int threads, Parallel *parallel) {
    pthread_t handles[256];
    int started = 0;
    if (threads > 256) threads = 256;
    if (parallel != NULL && threads > 1) {
        parallel(work_off, &queue, (unsigned)threads, 0);
        return;
    }
    for (int i = 1; i < threads && i < queue.jobs; i++)
        if (pthread_create(&handles[started], NULL, start_thread, &queue) == 0) started++;
    work_off(&queue);
    for (int i = 0; i < started; i++) pthread_join(handles[i], NULL);
}

/* Run the forward (y given) or backward pass on at most 256 threads.
 *
 * `parallel` is GOMP_parallel of the OpenMP runtime that the process already runs, or NULL. Its threads wait for work in a busy
 * loop, and threads beside them would have to share the cores with it. Without one, POSIX threads are started.
 */
void scan_run(const Problem *problem, int threads, Parallel *parallel) {
    if (problem->y != NULL) {
        run_jobs((Queue){problem, forward_job, forward_jobs(problem), 0, 0}, threads, parallel);
        return;
    }
    run_jobs((Queue){problem, backward_job, backward_jobs(problem), 0, 0}, threads, parallel);
    run_jobs((Queue){problem, gather_job, gather_jobs(problem), 0, 0}, threads, parallel);
}
