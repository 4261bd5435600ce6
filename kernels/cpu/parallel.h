// Independent items of work on threads that live for one call.
#pragma once
#include <pthread.h>
#include <stdint.h>

enum { MOST_THREADS = 256 };
enum { DONE, NO_MEMORY, BAD_INDEX };  // what an item, and a kernel, returns; kernels/cpu/module.py has the same order

typedef int (*Work)(const void *call, int64_t item);

struct Team {
    Work work;
    const void *call;
    int64_t items, next;
    int failed;
};

static void *member(void *argument)
{
    struct Team *team = argument;
    int64_t item;
    while ((item = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->items) {
        int failed = team->work(team->call, item);
        if (failed)
            __atomic_store_n(&team->failed, failed, __ATOMIC_RELAXED);
    }
    return NULL;
}

// work(call, item) for every item below `items`. Items write to disjoint memory: which thread takes one is no matter.
static int parallel(Work work, const void *call, int64_t items, int64_t threads)
{
    struct Team team = {.work = work, .call = call, .items = items};
    pthread_t started[MOST_THREADS];
    int64_t count = 0, wanted = (threads < items ? threads : items) - 1;
    while (count < wanted && count < MOST_THREADS && !pthread_create(&started[count], NULL, member, &team))
        count++;
    member(&team);
    while (count)
        pthread_join(started[--count], NULL);
    return team.failed;
}

// The part of `cu [parts + 1]`, which never falls, that `at` is in.
static inline __attribute__((unused)) int64_t part_of(const int32_t *cu, int64_t parts, int64_t at)
{
    int64_t low = 0, high = parts - 1;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (at < cu[middle + 1])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}
