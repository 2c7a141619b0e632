/* The plain reads of a batch: looked up, read and compared with their checksums in one call.
 *
 * Everything about an operation is checked here as plainread.py says; whatever is not plain is left
 * to Python, which knows the reasons. The GIL is held for the look-ups and released once for all
 * reads. read_plainly_twin in plainread.py is the oracle of the test. Limited API, no state.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <sys/uio.h>

#include "../fabric/packed.h"
#include "../proto/packed.h"
#include "../runtime/crc32c.h"

enum { DONE, REFUSED, DISPUTED, NOT_PLAIN, NOT_CACHED, DIFFERENT, FAILED };
enum { SUMS_AT_ONCE = 64, STEP_BYTES = 128 << 10 };

struct __attribute__((packed)) place { /* plainread.py, PLACE */
    int32_t fd;
    uint32_t grain, length;
    uint64_t start, version;
};

struct job {
    struct place place;
    PyObject *plan, *sums; /* the first is held */
    char *sink;
    uint32_t offset, length;
};

/* Who reads: the batch as it came, and what was looked up for the operation before. */
struct batch {
    const char *operations, *descriptors;
    PyObject *regions, *admit, *admitted; /* the last is held */
    Py_buffer streamed, region;
    uint32_t target, chain_version, region_id;
    uint64_t streamed_at;
};

static int in_region(struct batch *batch, const struct descriptor *sink, char **where) {
    if (sink->region == STREAMED) {
        uint64_t at = batch->streamed_at;
        batch->streamed_at += sink->bytes;
        if (batch->streamed_at > (uint64_t)batch->streamed.len) return 0;
        *where = (char *)batch->streamed.buf + at;
        return 1;
    }
    if (batch->region.obj == NULL || sink->region != batch->region_id) {
        if (batch->region.obj != NULL) PyBuffer_Release(&batch->region);
        PyObject *id = PyLong_FromUnsignedLong(sink->region);
        PyObject *view = id == NULL ? NULL : PyDict_GetItemWithError(batch->regions, id);
        Py_XDECREF(id);
        if (view == NULL) return PyErr_Occurred() ? -1 : 0;
        if (PyObject_GetBuffer(view, &batch->region, PyBUF_WRITABLE) < 0) return -1;
        batch->region_id = sink->region;
    }
    uint64_t size = (uint64_t)batch->region.len;
    if (sink->offset > size || sink->bytes > size - sink->offset) return 0;
    *where = (char *)batch->region.buf + sink->offset;
    return 1;
}

/* What may be read of a target: asked once for a run of operations. Borrowed; NULL on error. */
static PyObject *admitted(struct batch *batch, const struct operation *wanted) {
    if (batch->admitted == NULL || wanted->target != batch->target ||
        wanted->chain_version != batch->chain_version) {
        Py_XDECREF(batch->admitted);
        batch->admitted = PyObject_CallFunction(batch->admit, "II", wanted->target, wanted->chain_version);
        batch->target = wanted->target;
        batch->chain_version = wanted->chain_version;
    }
    return batch->admitted;
}

/* How a chunk is read, if plan and record still belong together; held, NULL if not or on error. */
static PyObject *planned(PyObject *plain, PyObject *chunk) {
    PyObject *records = PyTuple_GetItem(plain, 2), *plans = PyTuple_GetItem(plain, 3);
    PyObject *record = PyDict_GetItemWithError(records, chunk);
    PyObject *plan = record == NULL || record == Py_None ? NULL : PyDict_GetItemWithError(plans, chunk);
    if (PyErr_Occurred()) return NULL;
    if (plan != NULL && PyTuple_GetItem(plan, 0) == record) {
        Py_INCREF(plan);
        PyObject *touched = PyObject_CallFunctionObjArgs(PyTuple_GetItem(plain, 5), chunk, NULL);
        if (touched != NULL) {
            Py_DECREF(touched);
            return plan;
        }
        Py_DECREF(plan);
        return NULL;
    }
    plan = PyObject_CallFunctionObjArgs(PyTuple_GetItem(plain, 6), chunk, NULL);
    if (plan != Py_None) return plan;
    Py_DECREF(plan);
    return NULL;
}

/* Look up one operation whose sink is known. Returns its state so far, -1 on error. */
static int look(PyObject *plain, const struct operation *wanted, struct job *job) {
    PyObject *chunk = PyBytes_FromStringAndSize(wanted->chunk, sizeof wanted->chunk), *plan = NULL;
    int state = -1, disputed = 0;
    if (chunk == NULL) return -1;
    for (int i = 0; i < 2 && disputed == 0; i++)
        disputed = PySequence_Contains(PyTuple_GetItem(plain, i), chunk);
    if (disputed != 0) {
        state = disputed < 0 ? -1 : DISPUTED;
    } else if ((plan = planned(plain, chunk)) == NULL) {
        state = PyErr_Occurred() ? -1 : NOT_PLAIN;
    } else {
        memcpy(&job->place, PyBytes_AsString(PyTuple_GetItem(plan, 1)), sizeof job->place);
        uint64_t stop = (uint64_t)wanted->offset + wanted->length;
        const struct place *at = &job->place;
        int redone = PySequence_Contains(PyTuple_GetItem(plain, 4), PyTuple_GetItem(plan, 3));
        int whole = stop % at->grain == 0 || stop == at->length;
        if (redone < 0) {
            state = -1;
        } else if (redone || at->fd < 0 || !wanted->length || wanted->offset % at->grain || stop > at->length || !whole) {
            state = NOT_PLAIN;
        } else {
            job->plan = plan; /* with it its checksums live on */
            job->sums = PyTuple_GetItem(plan, 2);
            job->offset = wanted->offset;
            job->length = wanted->length;
            Py_INCREF(plan);
            state = DONE;
        }
    }
    Py_XDECREF(plan);
    Py_DECREF(chunk);
    return state;
}

static int take(struct batch *batch, Py_ssize_t index, struct job *job) {
    struct operation wanted;
    struct descriptor sink;
    memcpy(&wanted, batch->operations + index * (Py_ssize_t)sizeof wanted, sizeof wanted);
    memcpy(&sink, batch->descriptors + index * (Py_ssize_t)sizeof sink, sizeof sink);
    int inside = in_region(batch, &sink, &job->sink);
    if (inside < 0) return -1;
    if (!inside || sink.bytes != wanted.length) return REFUSED;
    PyObject *plain = admitted(batch, &wanted);
    if (plain == NULL) return -1;
    return plain == Py_None ? REFUSED : look(plain, &wanted, job);
}

/* Read what is in memory and compare it, step by step, while it is in the cache of the CPU. */
static char perform(const struct job *job, const char *sums, Py_ssize_t sums_bytes) {
    uint32_t found[SUMS_AT_ONCE];
    size_t grain = job->place.grain, step = STEP_BYTES / grain * grain, total = job->length;
    size_t at_sum = job->offset / grain * 4;
    if (step == 0) step = grain;
    if (step > grain * SUMS_AT_ONCE) step = grain * SUMS_AT_ONCE;
    for (size_t at = 0; at < total; at += step) {
        size_t bytes = total - at < step ? total - at : step;
        struct iovec part = {job->sink + at, bytes};
        ssize_t count = preadv2(job->place.fd, &part, 1, (off_t)(job->place.start + job->offset + at), RWF_NOWAIT);
        if (count < 0) return errno == EAGAIN || errno == EOPNOTSUPP ? NOT_CACHED : FAILED;
        if ((size_t)count != bytes) return NOT_CACHED;
        size_t sums_here = (bytes + grain - 1) / grain * 4;
        if (at_sum + sums_here > (size_t)sums_bytes) return DIFFERENT;
        blocks(job->sink + at, bytes, grain, found);
        if (memcmp(found, sums + at_sum, sums_here) != 0) return DIFFERENT;
        at_sum += sums_here;
    }
    return DONE;
}

static void perform_all(struct job *jobs, Py_ssize_t count, char *states, char *results, const char **sums, Py_ssize_t *sums_bytes) {
    for (Py_ssize_t i = 0; i < count; i++) {
        struct result result = {0};
        if (jobs[i].plan != NULL) states[i] = perform(&jobs[i], sums[i], sums_bytes[i]);
        if (states[i] == DONE) {
            result.length = jobs[i].length;
            result.version = jobs[i].place.version;
        }
        memcpy(results + i * (Py_ssize_t)sizeof result, &result, sizeof result);
    }
}

static PyObject *run(struct batch *batch, Py_ssize_t count) {
    size_t each = sizeof(struct job) + sizeof(char *) + sizeof(Py_ssize_t);
    struct job *jobs = PyMem_Calloc((size_t)count, each);
    PyObject *states = PyBytes_FromStringAndSize(NULL, count), *answer = NULL;
    PyObject *results = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(struct result));
    Py_ssize_t taken = 0;
    if (jobs != NULL && states != NULL && results != NULL) {
        char *state = PyBytes_AsString(states), *result = PyBytes_AsString(results);
        const char **sums = (const char **)(jobs + count);
        Py_ssize_t *sums_bytes = (Py_ssize_t *)(sums + count);
        for (; taken < count; taken++) {
            int found = take(batch, taken, &jobs[taken]);
            if (found < 0) break;
            state[taken] = (char)found;
            if (found == DONE) {
                sums[taken] = PyBytes_AsString(jobs[taken].sums);
                sums_bytes[taken] = PyBytes_Size(jobs[taken].sums);
            }
        }
        if (taken == count) {
            Py_BEGIN_ALLOW_THREADS
            perform_all(jobs, count, state, result, sums, sums_bytes);
            Py_END_ALLOW_THREADS
            answer = PyTuple_Pack(2, results, states);
        }
    } else if (jobs == NULL) {
        PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; jobs != NULL && i < taken; i++) Py_XDECREF(jobs[i].plan);
    Py_XDECREF(states);
    Py_XDECREF(results);
    PyMem_Free(jobs);
    return answer;
}

static PyObject *read_plainly(PyObject *self, PyObject *args) {
    Py_buffer operations, descriptors;
    struct batch batch = {0};
    PyObject *answer = NULL;
    if (!PyArg_ParseTuple(args, "y*y*O!w*O", &operations, &descriptors, &PyDict_Type, &batch.regions, &batch.streamed, &batch.admit))
        return NULL;
    Py_ssize_t count = operations.len / (Py_ssize_t)sizeof(struct operation);
    batch.operations = operations.buf;
    batch.descriptors = descriptors.buf;
    if (count <= 0 || operations.len != count * (Py_ssize_t)sizeof(struct operation) ||
        descriptors.len != count * (Py_ssize_t)sizeof(struct descriptor))
        PyErr_SetString(PyExc_ValueError, "as many descriptors as operations, and at least one");
    else
        answer = run(&batch, count);
    if (batch.region.obj != NULL) PyBuffer_Release(&batch.region);
    Py_XDECREF(batch.admitted);
    PyBuffer_Release(&batch.streamed);
    PyBuffer_Release(&descriptors);
    PyBuffer_Release(&operations);
    return answer;
}

static PyMethodDef methods[] = {
    {"read_plainly", read_plainly, METH_VARARGS, "(results, states) of the operations of a batch."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_plainread", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__plainread(void) {
    crc32c_begin();
    return PyModule_Create(&module);
}
