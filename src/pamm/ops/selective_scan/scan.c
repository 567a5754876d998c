/* The selective scan on a CPU, forward and backward: plain C11 with the vector extensions of GCC and Clang.
 *
 * LANES neighbouring channels share a vector. States are taken in small blocks that stay in registers. For one block of
 * channels and states, E[l, n] = exp(delta[l] A[n]) is computed once per position and read by every order through the order's
 * index, so nothing is permuted.
 *
 * Jobs write to places of their own. The backward pass's split into jobs depends only on the shapes, and in the forward pass a
 * vector of channels is computed alike in any job: the result has the same bits for any number of threads.
 */
#include "scan_forward.h"
#include "scan_backward.h"
#include "../jobs.h"

/* Floats that one thread needs, a multiple of 16. */
int64_t scan_workspace(int64_t length) {
    int64_t forward = forward_workspace(length), backward = backward_workspace(length);
    return ((forward > backward ? forward : backward) + 15) / 16 * 16;
}

/* Floats of `parts`. */
int64_t scan_parts(const Problem *problem) { return backward_jobs(problem) * slice_parts(problem); }

/* Run the forward (y given) or backward pass on at most MOST_THREADS threads. */
void scan_run(const Problem *problem, int threads, Parallel *parallel) {
    int64_t each = scan_workspace(problem->length);
    if (problem->y != NULL) {
        Problem forward = *problem;
        forward.slices = forward_slices(problem, threads);
        run_jobs((Queue){forward_job, &forward, forward_jobs(&forward), problem->work, each, 0, 0}, threads, parallel);
        return;
    }
    run_jobs((Queue){backward_job, problem, backward_jobs(problem), problem->work, each, 0, 0}, threads, parallel);
    run_jobs((Queue){gather_job, problem, gather_jobs(problem), problem->work, each, 0, 0}, threads, parallel);
}
