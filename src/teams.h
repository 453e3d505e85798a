/* Which calls get a team of OpenMP threads, and what becomes of it when the process forks.

   A thread that has run a parallel loop keeps its team for the next one: GNU OpenMP has a pool for
   every calling thread. A service with many request threads would keep as many teams, each as large
   as the machine, whose threads spin for a while after each call. And a forked child has none of
   these threads, which GNU OpenMP does not know: it would wait for them forever. LLVM's runtime, and
   Intel's, which is one with it, know forks, unless told not to by a variable of the environment that
   scikit-learn sets; to them a pause is a sleep, and two in a row an error. */
#ifndef CBN_TEAMS_H
#define CBN_TEAMS_H

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include "threads.h"

#ifdef _OPENMP

#include <pthread.h>

enum {
    MOST_TEAMS = 2,           /* that are kept, by as many threads */
    WORTH_A_TEAM = 1 << 20,   /* values that take longer than to make a team and give it up */
    SOFT = 1,                 /* omp_pause_soft; omp_pause_hard would forget settings too */
};

/* Changed with the GIL held, but for teams, which a thread that ends makes fewer. */
static int calls;                          /* in flight */
static int teams;                          /* kept */
static int alone;                          /* after a fork in which a team was not given up */
static int knows_forks;                    /* the runtime itself */
static int (*pause_all)(int);              /* omp_pause_resource_all, where it gives up teams */
static int may_keep_teams;                 /* there is a key, by which they end with their threads */
static pthread_key_t end_of_thread;
static __thread int keeps_team;
static __thread int gives_up_team;         /* after this call */
static __thread int refused;               /* to give up a team */
static __thread int new_team;              /* begins with this call */
static int new_child;                      /* of a fork since this was asked */

static void forget_team(void *keeper) {
    (void)keeper;
    if (keeps_team)
        __atomic_sub_fetch(&teams, 1, __ATOMIC_RELAXED);
    keeps_team = 0;
}

/* The number of threads for a call on so many values that may use num_threads. */
static int begin_call(int num_threads, ptrdiff_t values) {
    gives_up_team = 0;
    new_team = 0;
    if (calls++ > 0 || num_threads == 1 || alone)
        return 1;
    if (keeps_team)
        return num_threads;
    /* The value is not NULL, or forget_team would not be called. */
    if (may_keep_teams && __atomic_load_n(&teams, __ATOMIC_RELAXED) < MOST_TEAMS
        && pthread_setspecific(end_of_thread, &keeps_team) == 0) {
        __atomic_add_fetch(&teams, 1, __ATOMIC_RELAXED);
        keeps_team = new_team = 1;
        return num_threads;
    }
    gives_up_team = pause_all && values >= WORTH_A_TEAM;
    return gives_up_team ? num_threads : 1;
}

static void end_call(void) {
    calls--;
    if (gives_up_team)
        pause_all(SOFT);
}

static void before_fork(void) {
    if (knows_forks)
        return;
    /* The runtime refuses in a parallel loop, for example. */
    refused = !pause_all || pause_all(SOFT) != 0;
    if (!refused)
        forget_team(NULL);
}

static void in_child(void) {
    /* The other threads are gone, with their teams and calls. */
    calls = 0;
    teams = keeps_team;
    alone = alone || refused;
    new_child = 1;
}

static int has_new_team(void) { return new_team || gives_up_team; }

/* Whether this is the first question in a child. */
static int is_new_child(void) {
    int answer = new_child;
    new_child = 0;
    return answer;
}

static int children_have_teams(void) { return knows_forks || pause_all; }

/* Whether LLVM's runtime does. Its first call, which this may be, reads the variable. */
static int registers_forks(void) {
    omp_get_max_threads();
    const char *value = getenv("KMP_INIT_AT_FORK");
    return !value || (*value && strchr("1TtYy", *value));
}

/* 0, or the error for which nobody would hear of a fork. */
static int watch_forks_and_threads(void) {
    void *runtime = dlopen(openmp_library(), RTLD_LAZY | RTLD_NOLOAD);
    /* Asked of the very runtime that is linked; what it says of its version tells nothing: that of
       gcc 12 has the function of OpenMP 5.0 and reports 4.5. */
    if (runtime && dlsym(runtime, "__kmpc_fork_call"))
        knows_forks = registers_forks();
    else if (runtime)
        *(void **)&pause_all = dlsym(runtime, "omp_pause_resource_all");
    may_keep_teams = pthread_key_create(&end_of_thread, forget_team) == 0;   /* a process has 1024 */
    return pthread_atfork(before_fork, NULL, in_child);
}

#else

static int begin_call(int num_threads, ptrdiff_t values) {
    (void)num_threads, (void)values;
    return 1;
}
static void end_call(void) {}
static int has_new_team(void) { return 0; }
static int is_new_child(void) { return 0; }
static int children_have_teams(void) { return 1; }
static int watch_forks_and_threads(void) { return 0; }

#endif
#endif
