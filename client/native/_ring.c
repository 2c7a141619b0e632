/* What Python cannot say about memory that two processes share.
 *
 * Loads and stores of a 32-bit word with the fences that the ring's protocol needs (layout.py), a
 * wait that spins outside the GIL, the address of a buffer, and what a file is without asking
 * its file system: the daemon would have to answer that itself. Limited API, no state.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>

/* The word at a place of a buffer; NULL with an exception set if it is not inside. */
static _Atomic uint32_t *word(const Py_buffer *memory, Py_ssize_t at) {
    if (at < 0 || at % 4 != 0 || at > memory->len - 4) {
        PyErr_SetString(PyExc_IndexError, "no word there");
        return NULL;
    }
    return (_Atomic uint32_t *)((char *)memory->buf + at);
}

static PyObject *load(PyObject *self, PyObject *args) {
    Py_buffer memory;
    Py_ssize_t at;
    if (!PyArg_ParseTuple(args, "y*n", &memory, &at)) return NULL;
    _Atomic uint32_t *place = word(&memory, at);
    PyObject *result = NULL;
    if (place != NULL)
        result = PyLong_FromUnsignedLong(atomic_load_explicit(place, memory_order_acquire));
    PyBuffer_Release(&memory);
    return result;
}

static PyObject *store_then_load(PyObject *self, PyObject *args) {
    Py_buffer memory;
    Py_ssize_t at, look;
    unsigned int value;
    if (!PyArg_ParseTuple(args, "w*nIn", &memory, &at, &value, &look)) return NULL;
    _Atomic uint32_t *place = word(&memory, at), *other = NULL;
    if (place != NULL) other = word(&memory, look);
    PyObject *result = NULL;
    if (other != NULL) {
        atomic_store_explicit(place, value, memory_order_release);
        atomic_thread_fence(memory_order_seq_cst);
        result = PyLong_FromUnsignedLong(atomic_load_explicit(other, memory_order_acquire));
    }
    PyBuffer_Release(&memory);
    return result;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static PyObject *spin(PyObject *self, PyObject *args) {
    Py_buffer memory;
    Py_ssize_t at;
    unsigned int value, found;
    long long spin_ns;
    if (!PyArg_ParseTuple(args, "y*nIL", &memory, &at, &value, &spin_ns)) return NULL;
    _Atomic uint32_t *place = word(&memory, at);
    PyObject *result = NULL;
    if (place != NULL) {
        Py_BEGIN_ALLOW_THREADS
        int64_t end = now_ns() + spin_ns;
        while ((found = atomic_load_explicit(place, memory_order_acquire)) == value) {
            for (int i = 0; i < 64; i++) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
            if (now_ns() >= end) break;
        }
        Py_END_ALLOW_THREADS
        result = PyLong_FromUnsignedLong(found);
    }
    PyBuffer_Release(&memory);
    return result;
}

static PyObject *address(PyObject *self, PyObject *object) {
    Py_buffer memory;
    if (PyObject_GetBuffer(object, &memory, PyBUF_C_CONTIGUOUS) < 0) return NULL;
    PyObject *start = PyLong_FromVoidPtr(memory.buf), *result = NULL;
    if (start != NULL) {
        result = Py_BuildValue("(Nni)", start, memory.len, memory.readonly);
    }
    PyBuffer_Release(&memory);
    return result;
}

static PyObject *identify(PyObject *self, PyObject *args) {
    const char *path;
    struct statx found;
    if (!PyArg_ParseTuple(args, "s", &path)) return NULL;
    if (statx(AT_FDCWD, path, AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO | STATX_MNT_ID, &found) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    unsigned long long device = makedev(found.stx_dev_major, found.stx_dev_minor);
    return Py_BuildValue("(KKIK)", device, (unsigned long long)found.stx_ino,
                         (unsigned int)found.stx_mode, (unsigned long long)found.stx_mnt_id);
}

static PyMethodDef methods[] = {
    {"load", load, METH_VARARGS, "The word at a place."},
    {"store_then_load", store_then_load, METH_VARARGS, "Store a word, fence, load another."},
    {"spin", spin, METH_VARARGS, "Wait for a word to change, for so many ns; what it is then."},
    {"address", address, METH_O, "(address, bytes, readonly) of a contiguous buffer."},
    {"identify", identify, METH_VARARGS, "(device, inode, mode, mount id) of what is at a path, from memory."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_ring", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__ring(void) { return PyModule_Create(&module); }
