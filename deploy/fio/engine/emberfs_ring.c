/* The fio ioengine of rings (docs/fio-ring.md): fio's buffers are memory that the daemon of the mount
 * shares, so that data lands in them without passing through the kernel's FUSE layer.
 *
 * Each job, process or thread, has a connection, a ring and a region of its own: fio calls init()
 * in the job. Files are opened through the mount as by every other engine, then registered; fsync
 * is that of the descriptor. Compiled against the headers of the fio that loads it.
 */
#include "fio.h"
#include "optgroup.h"

#include <emberfs.h>

enum { ENTRIES_MAX = 32768, ENTRY_BYTES_MAX = 1 << 30 }; /* of a ring: see emberfs.h */
enum { SILENCE_S_MAX = 180 }; /* the daemon itself answers or fails a request after 60 s */

struct job {
    struct emberfs *daemon;
    struct emberfs_ring *ring;
    struct emberfs_region memory; /* base NULL: not allocated */
    struct emberfs_completion *events;
    struct io_u **queued; /* prepared, not yet submitted */
    unsigned queued_count;
};

struct ring_options {
    void *unused; /* fio takes offset 0 for none */
    int priority;
    unsigned depth;
    unsigned gather_us;
};

static struct fio_option options[] = {
    {
        .name = "ring_priority",
        .lname = "Priority of the ring",
        .type = FIO_OPT_INT,
        .off1 = offsetof(struct ring_options, priority),
        .minval = -1,
        .maxval = 1,
        .def = "0",
        .help = "-1 is served before 0, 0 before 1",
        .category = FIO_OPT_C_ENGINE,
        .group = FIO_OPT_G_INVALID,
    },
    {
        .name = "ring_gather_us",
        .lname = "Gathering time of the ring",
        .type = FIO_OPT_INT,
        .off1 = offsetof(struct ring_options, gather_us),
        .maxval = 1000000,
        .def = "0",
        .help = "Wait so many microseconds for ring_depth entries before beginning",
        .category = FIO_OPT_C_ENGINE,
        .group = FIO_OPT_G_INVALID,
    },
    {
        .name = "ring_depth",
        .lname = "Gathered entries of the ring",
        .type = FIO_OPT_INT,
        .off1 = offsetof(struct ring_options, depth),
        .maxval = ENTRIES_MAX,
        .def = "0",
        .help = "With ring_gather_us: begin when so many entries wait",
        .category = FIO_OPT_C_ENGINE,
        .group = FIO_OPT_G_INVALID,
    },
    {.name = NULL},
};

/* Say what failed in full, and leave fio the errno: its own message has only 128 characters. */
static int failed(struct thread_data *td, int result, const char *what, const char *advice) {
    log_err("emberfs: %s: %s%s\n", what, emberfs_reason(), advice);
    td_verror(td, -result, "emberfs");
    return 1;
}

/* ------------------------------------------------------------ a job's start and end */

/* Connect to the daemon of the job's first file, or of its directory: it may not exist yet. */
static int connect_job(struct thread_data *td, struct emberfs **daemon) {
    if (td->files_index == 0) {
        log_err("emberfs: job %s names no file to find the mount by\n", td->o.name);
        td_verror(td, EINVAL, "emberfs");
        return 1;
    }
    if (td->o.iodepth > ENTRIES_MAX || td_max_bs(td) > ENTRY_BYTES_MAX) {
        log_err("emberfs: a ring takes iodepth up to %d and blocks up to %d bytes\n", ENTRIES_MAX,
                ENTRY_BYTES_MAX);
        td_verror(td, EINVAL, "emberfs");
        return 1;
    }
    if (fio_option_is_set(&td->o, mem_type)) {
        log_err("emberfs: fio's buffers are memory of the rings: remove iomem= from the job\n");
        td_verror(td, EINVAL, "emberfs");
        return 1;
    }
    char place[PATH_MAX];
    snprintf(place, sizeof place, "%s", td->files[0]->file_name);
    if (access(place, F_OK) < 0) {
        char *slash = strrchr(place, '/');
        if (slash == NULL) strcpy(place, ".");
        else slash[slash == place] = '\0';
    }
    int error = emberfs_connect(place, daemon);
    if (error == 0) return 0;
    return failed(td, error == -ENOENT ? -EOPNOTSUPP : error, place,
                  ": this engine needs files on an emberfs mount whose `rings` is not \"\"; "
                  "without rings use psync or libaio");
}

/* fio asks for the files' sizes before it lays them out: what cannot work must show here and not
 * after gigabytes were written. */
static int ring_setup(struct thread_data *td) {
    struct emberfs *daemon;
    struct fio_file *f;
    unsigned i;
    if (strcmp(fio_version_string, BUILT_FOR) != 0) {
        log_err("emberfs: the engine is for %s, this is %s: build it again (make fio-engine)\n",
                BUILT_FOR, fio_version_string);
        return 1;
    }
    if (td->io_ops_data == NULL && td->files_index != 0) { /* not in the job already */
        if (connect_job(td, &daemon) != 0) return 1;
        emberfs_disconnect(daemon);
    }
    for_each_file(td, f, i) {
        if (generic_get_file_size(td, f) != 0) {
            if (td->error != ENOENT) return 1;
            td_clear_error(td);
        }
        if (f->real_file_size == -1ULL && td->o.size)
            f->real_file_size = td->o.size / td->o.nr_files;
    }
    return 0;
}

static void ring_cleanup(struct thread_data *td) {
    struct job *job = td->io_ops_data;
    if (job == NULL) return;
    emberfs_region_destroy(job->daemon, &job->memory, 0);
    emberfs_ring_destroy(job->ring);
    emberfs_disconnect(job->daemon);
    free(job->events);
    free(job->queued);
    free(job);
    td->io_ops_data = NULL;
}

static int ring_init(struct thread_data *td) {
    struct ring_options *o = td->eo;
    struct emberfs_terms terms = {.entries = 1, .priority = o->priority, .depth = o->depth,
                                  .gather_us = o->gather_us};
    while (terms.entries < td->o.iodepth && terms.entries < ENTRIES_MAX) terms.entries *= 2;
    struct job *job = calloc(1, sizeof *job);
    if (job == NULL) return ENOMEM;
    td->io_ops_data = job;
    job->events = calloc(terms.entries, sizeof *job->events);
    job->queued = calloc(terms.entries, sizeof *job->queued);
    int error = job->events == NULL || job->queued == NULL ? ENOMEM : connect_job(td, &job->daemon);
    if (error == 0) {
        int result = emberfs_ring_create(job->daemon, &terms, &job->ring);
        if (result != 0) error = failed(td, result, "no ring", "");
    }
    if (error != 0) ring_cleanup(td);
    return error;
}

/* ------------------------------------------------------------ memory and files */

static int ring_iomem_alloc(struct thread_data *td, size_t bytes) {
    struct job *job = td->io_ops_data;
    int result = emberfs_region_create(job->daemon, bytes, NULL, &job->memory);
    if (result != 0) return failed(td, result, "no memory for fio's buffers", "");
    td->orig_buffer = job->memory.base;
    return 0;
}

/* fio goes on without buffers if it could not allocate them. */
static int ring_post_init(struct thread_data *td) { return td->error; }

static void ring_iomem_free(struct thread_data *td) {
    struct job *job = td->io_ops_data;
    if (job != NULL) emberfs_region_destroy(job->daemon, &job->memory, 0);
}

static int ring_open_file(struct thread_data *td, struct fio_file *f) {
    struct job *job = td->io_ops_data;
    int error = generic_open_file(td, f);
    if (error != 0) return error;
    int64_t number = emberfs_file_register(job->daemon, f->fd);
    if (number < 0) {
        failed(td, (int)number, f->file_name, "");
        return generic_close_file(td, f) | 1;
    }
    FILE_SET_ENG_DATA(f, (void *)(uintptr_t)number);
    return 0;
}

static int ring_close_file(struct thread_data *td, struct fio_file *f) {
    struct job *job = td->io_ops_data;
    int64_t number = (int64_t)(uintptr_t)FILE_ENG_DATA(f);
    if (job != NULL && number > 0) emberfs_file_forget(job->daemon, number);
    FILE_SET_ENG_DATA(f, NULL);
    return generic_close_file(td, f);
}

/* ------------------------------------------------------------ reads and writes */

static enum fio_q_status ring_queue(struct thread_data *td, struct io_u *io_u) {
    struct job *job = td->io_ops_data;
    fio_ro_check(td, io_u);
    if (io_u->ddir != DDIR_READ && io_u->ddir != DDIR_WRITE) {
        if (job->queued_count != 0) return FIO_Q_BUSY; /* fio submits those, then asks again */
        if (io_u->ddir == DDIR_TRIM) do_io_u_trim(td, io_u);
        else do_io_u_sync(td, io_u);
        return FIO_Q_COMPLETED;
    }
    int result = emberfs_prepare(
        job->ring, io_u->ddir == DDIR_READ ? EMBERFS_READ : EMBERFS_WRITE,
        (int64_t)(uintptr_t)FILE_ENG_DATA(io_u->file), io_u->offset, &job->memory, io_u->xfer_buf,
        (uint32_t)io_u->xfer_buflen, (uintptr_t)io_u);
    if (result == -EAGAIN) return FIO_Q_BUSY;
    if (result != 0) {
        log_err("emberfs: %s: %s\n", io_u->file->file_name, emberfs_reason());
        io_u->error = (unsigned)-result;
        return FIO_Q_COMPLETED;
    }
    job->queued[job->queued_count++] = io_u;
    return FIO_Q_QUEUED;
}

static int ring_commit(struct thread_data *td) {
    struct job *job = td->io_ops_data;
    if (job->queued_count == 0) return 0;
    int result = emberfs_submit(job->ring);
    if (result < 0) return result;
    if (fio_fill_issue_time(td)) {
        struct timespec now;
        fio_gettime(&now, NULL);
        for (unsigned i = 0; i < job->queued_count; i++) {
            job->queued[i]->issue_time = now;
            io_u_queued(td, job->queued[i]);
        }
        if (td->o.read_iolog_file) td->last_issue = now;
    }
    io_u_mark_submit(td, job->queued_count);
    job->queued_count = 0;
    return 0;
}

static int ring_getevents(struct thread_data *td, unsigned min, unsigned max,
                          const struct timespec *t) {
    struct job *job = td->io_ops_data;
    const struct timespec patience = {.tv_sec = SILENCE_S_MAX};
    int count = emberfs_wait(job->ring, job->events, max, min, t != NULL ? t : &patience);
    if (count == 0 && min != 0 && t == NULL) {
        log_err("emberfs: the client daemon has completed nothing for %d s\n", SILENCE_S_MAX);
        td_verror(td, ETIMEDOUT, "emberfs");
        return -ETIMEDOUT;
    }
    if (count < 0 && td->error == 0) failed(td, count, "waiting for completions", "");
    return count;
}

static struct io_u *ring_event(struct thread_data *td, int event) {
    struct job *job = td->io_ops_data;
    const struct emberfs_completion *done = &job->events[event];
    struct io_u *io_u = (struct io_u *)(uintptr_t)done->user_data;
    if (done->result < 0) io_u->error = (unsigned)-done->result;
    else io_u->resid = io_u->xfer_buflen - (unsigned long long)done->result;
    return io_u;
}

/* No FIO_NOEXTEND: a ring's write extends its file as any other. No FIO_MEMALIGN: the region begins
 * at a page, and a ring asks for no alignment. Offloaded submission would be from other threads,
 * with rings that do not know the job's memory. */
struct ioengine_ops ioengine = {
    .name = "emberfs",
    .version = FIO_IOOPS_VERSION,
    .flags = FIO_NO_OFFLOAD,
    .setup = ring_setup,
    .init = ring_init,
    .post_init = ring_post_init,
    .cleanup = ring_cleanup,
    .iomem_alloc = ring_iomem_alloc,
    .iomem_free = ring_iomem_free,
    .open_file = ring_open_file,
    .close_file = ring_close_file,
    .queue = ring_queue,
    .commit = ring_commit,
    .getevents = ring_getevents,
    .event = ring_event,
    .option_struct_size = sizeof(struct ring_options),
    .options = options,
};
