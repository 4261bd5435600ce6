// Independent items of work on threads that live for one call.
#pragma once
#include <pthread.h>
#include <stdint.h>

enum { MOST_THREADS = 256 };

typedef int (*Work)(const void *call, int64_t item);  // 0, or 1 where memory ran out

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
    while ((item = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->items)
        if (team->work(team->call, item))
            __atomic_store_n(&team->failed, 1, __ATOMIC_RELAXED);
    return NULL;
}

// work(call, item) for every item below `items`. Items write to disjoint memory, so which thread takes one is no matter.
static int parallel(Work work, const void *call, int64_t items, int64_t threads)
{
    struct Team team = {work, call, items, 0, 0};
    pthread_t started[MOST_THREADS];
    int64_t count = 0, wanted = (threads < items ? threads : items) - 1;
    while (count < wanted && count < MOST_THREADS && !pthread_create(&started[count], NULL, member, &team))
        count++;
    member(&team);
    while (count)
        pthread_join(started[--count], NULL);
    return team.failed;
}
