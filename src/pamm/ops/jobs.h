/* Jobs that several threads work off. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>

#include "vector.h"

#define MOST_THREADS 256

/* `work_each` floats of `work` belong to every thread that takes jobs. */
typedef struct {
    void (*job)(const void *problem, int64_t job, float *work);
    const void *problem;
    int64_t jobs;
    float *work;
    int64_t work_each;
    atomic_llong next_job, next_worker;
} Queue;

/* GOMP_parallel of the OpenMP runtime that the process already runs, or NULL. Its threads wait for work in a busy loop, and
 * threads beside them would have to share the cores with it. Without one, POSIX threads are started.
 */
typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

/* What every thread runs: takes a workspace, then jobs until none is left. */
static void work_off(void *argument) {
    Queue *queue = argument;
    float *work = queue->work + atomic_fetch_add(&queue->next_worker, 1) * queue->work_each;
    for (int64_t job; (job = atomic_fetch_add(&queue->next_job, 1)) < queue->jobs;) queue->job(queue->problem, job, work);
}

static void *start_thread(void *argument) {
    work_off(argument);
    return NULL;
}

static void run_jobs(Queue queue, int threads, Parallel *parallel) {
    pthread_t handles[MOST_THREADS];
    int started = 0;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (parallel != NULL && threads > 1) {
        parallel(work_off, &queue, (unsigned)threads, 0);
        return;
    }
    for (int i = 1; i < threads && i < queue.jobs; i++)
        if (pthread_create(&handles[started], NULL, start_thread, &queue) == 0) started++;
    work_off(&queue);
    for (int i = 0; i < started; i++) pthread_join(handles[i], NULL);
}

/* Ask for large pages: a job that touches one row after the other touches as many small pages as there are rows. */
void use_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

int vector_lanes(void) { return LANES; }
