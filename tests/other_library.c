/* Another user of OpenMP in the same process, with habits of its own. */
#include <errno.h>
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>

/* The floating-point modes of this thread. */
unsigned get_modes(void) { return _mm_getcsr(); }

void set_modes(unsigned modes) { _mm_setcsr(modes); }

void get_modes_of_team(int size, unsigned *modes) {
#pragma omp parallel num_threads(size)
    modes[omp_get_thread_num()] = _mm_getcsr();
}

/* Of all threads of a team but the first, which is the caller. */
void set_modes_of_team(int size, unsigned modes) {
#pragma omp parallel num_threads(size)
    if (omp_get_thread_num() > 0)
        _mm_setcsr(modes);
}
#endif

/* Fork, run a function in the child, and return the child's exit status. */
int fork_and_run(int (*in_child)(void)) {
    int status = -1;
    pid_t pid = fork();
    if (pid == 0)
        _exit(in_child());
    waitpid(pid, &status, 0);
    return status;
}

/* The same from within a team at work. */
int fork_and_run_in_a_team(int size, int (*in_child)(void)) {
    int status = -1;
#pragma omp parallel num_threads(size)
    if (omp_get_thread_num() == 0)
        status = fork_and_run(in_child);
    return status;
}

/* What pthread_atfork calls in the C library of GNU. Loaded before that, this fails instead. */
int __register_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void), void *of) {
    (void)prepare, (void)parent, (void)child, (void)of;
    return ENOMEM;
}
