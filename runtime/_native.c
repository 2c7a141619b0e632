/* CRC32C (Castagnoli, RFC 3720) of a run of equal blocks, and reads that are compared with theirs:
 * a whole batch in one call that releases the GIL.
 *
 * Four blocks are computed side by side: the crc32 instruction has a latency of three cycles and a
 * throughput of one, so a single chain would leave two thirds of the unit idle. The Python twins in
 * runtime/checksum.py and checkedread.py are the oracles of the tests. Limited API, one file, no state but a table.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

static uint32_t table[256];

static void fill_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ 0x82F63B78u : value >> 1;
        table[i] = value;
    }
}

static void blocks_portable(const uint8_t *data, size_t bytes, size_t block, uint32_t *out) {
    for (size_t at = 0; at < bytes; at += block) {
        size_t stop = bytes - at < block ? bytes : at + block;
        uint32_t crc = ~0u;
        for (size_t i = at; i < stop; i++) crc = table[(crc ^ data[i]) & 0xFF] ^ crc >> 8;
        *out++ = ~crc;
    }
}

#if defined(__x86_64__)
#include <nmmintrin.h>

__attribute__((target("sse4.2")))
static uint32_t one_block(const uint8_t *data, size_t bytes) {
    uint64_t crc = ~0u, word;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        memcpy(&word, data, 8);
        crc = _mm_crc32_u64(crc, word);
    }
    uint32_t tail = (uint32_t)crc;
    while (bytes--) tail = _mm_crc32_u8(tail, *data++);
    return ~tail;
}

__attribute__((target("sse4.2")))
static void blocks_fast(const uint8_t *data, size_t bytes, size_t block, uint32_t *out) {
    size_t at = 0;
    if (block % 8 == 0) {
        for (; bytes - at >= 4 * block; at += 4 * block, out += 4) {
            const uint8_t *p = data + at;
            uint64_t a = ~0u, b = ~0u, c = ~0u, d = ~0u, w, x, y, z;
            for (size_t i = 0; i < block; i += 8) {
                memcpy(&w, p + i, 8);
                memcpy(&x, p + block + i, 8);
                memcpy(&y, p + 2 * block + i, 8);
                memcpy(&z, p + 3 * block + i, 8);
                a = _mm_crc32_u64(a, w);
                b = _mm_crc32_u64(b, x);
                c = _mm_crc32_u64(c, y);
                d = _mm_crc32_u64(d, z);
            }
            out[0] = ~(uint32_t)a;
            out[1] = ~(uint32_t)b;
            out[2] = ~(uint32_t)c;
            out[3] = ~(uint32_t)d;
        }
    }
    for (; at < bytes; at += block)
        *out++ = one_block(data + at, bytes - at < block ? bytes - at : block);
}
static int have_fast(void) { return __builtin_cpu_supports("sse4.2"); }
#else
#define blocks_fast blocks_portable
static int have_fast(void) { return 0; }
#endif

static void blocks(const void *data, size_t bytes, size_t block, uint32_t *out) {
    if (have_fast())
        blocks_fast(data, bytes, block, out);
    else
        blocks_portable(data, bytes, block, out);
}

static PyObject *crc32c_blocks(PyObject *self, PyObject *args) {
    Py_buffer data;
    Py_ssize_t block;
    if (!PyArg_ParseTuple(args, "y*n", &data, &block)) return NULL;
    if (block <= 0) {
        PyBuffer_Release(&data);
        PyErr_SetString(PyExc_ValueError, "block_bytes must be positive");
        return NULL;
    }
    Py_ssize_t count = data.len / block + (data.len % block != 0);
    PyObject *result = PyBytes_FromStringAndSize(NULL, count * 4);
    if (result != NULL && count != 0) {
        uint32_t *out = (uint32_t *)PyBytes_AsString(result);
        Py_BEGIN_ALLOW_THREADS
        blocks(data.buf, (size_t)data.len, (size_t)block, out);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return result;
}

enum { DONE, NOT_CACHED, DIFFERENT, FAILED, SUMS_AT_ONCE = 64 };

struct job {
    int fd;
    int64_t offset;
    Py_buffer sink;
    const char *sums;
    Py_ssize_t sums_bytes, first;
    Py_ssize_t block;
};

/* Read what is in memory and compare it with its checksums. Without the GIL. */
static char perform(const struct job *job) {
    struct iovec part = {job->sink.buf, (size_t)job->sink.len};
    ssize_t count = preadv2(job->fd, &part, 1, job->offset, RWF_NOWAIT);
    if (count < 0) return errno == EAGAIN || errno == EOPNOTSUPP ? NOT_CACHED : FAILED;
    if (count != job->sink.len) return NOT_CACHED;
    uint32_t found[SUMS_AT_ONCE];
    size_t step = (size_t)job->block * SUMS_AT_ONCE, total = (size_t)job->sink.len;
    Py_ssize_t at_sum = job->first;
    for (size_t at = 0; at < total; at += step) {
        size_t bytes = total - at < step ? total - at : step;
        Py_ssize_t sums_bytes = (Py_ssize_t)((bytes + (size_t)job->block - 1) / (size_t)job->block * 4);
        if (at_sum + sums_bytes > job->sums_bytes) return DIFFERENT;
        blocks((const char *)job->sink.buf + at, bytes, (size_t)job->block, found);
        if (memcmp(found, job->sums + at_sum, (size_t)sums_bytes) != 0) return DIFFERENT;
        at_sum += sums_bytes;
    }
    return DONE;
}

/* One tuple of `read_checked`; what it names lives as long as the tuple does. */
static int take_job(PyObject *item, struct job *job) {
    long long offset;
    if (!PyArg_ParseTuple(item, "iLy#nnw*", &job->fd, &offset, &job->sums, &job->sums_bytes,
                          &job->first, &job->block, &job->sink))
        return -1;
    job->offset = offset;
    if (job->block > 0 && job->first >= 0) return 0;
    PyBuffer_Release(&job->sink);
    PyErr_SetString(PyExc_ValueError, "a block of checksums is positive");
    return -1;
}

static PyObject *read_checked(PyObject *self, PyObject *list) {
    PyObject *items = PySequence_Tuple(list), *result = NULL;
    if (items == NULL) return NULL;
    Py_ssize_t count = PyTuple_Size(items), taken = 0;
    struct job *jobs = PyMem_Malloc((size_t)(count ? count : 1) * sizeof *jobs);
    if (jobs == NULL) {
        PyErr_NoMemory();
    } else {
        while (taken < count && take_job(PyTuple_GetItem(items, taken), &jobs[taken]) == 0) taken++;
        if (taken == count) result = PyBytes_FromStringAndSize(NULL, count);
    }
    if (result != NULL) {
        char *states = PyBytes_AsString(result);
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < count; i++) states[i] = perform(&jobs[i]);
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t i = 0; i < taken; i++) PyBuffer_Release(&jobs[i].sink);
    PyMem_Free(jobs);
    Py_DECREF(items);
    return result;
}

static PyMethodDef methods[] = {
    {"crc32c_blocks", crc32c_blocks, METH_VARARGS, "CRC32C of each block, packed native u32."},
    {"read_checked", read_checked, METH_O, "Reads of what is in memory, compared with checksums."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void) {
    fill_table();
    return PyModule_Create(&module);
}
