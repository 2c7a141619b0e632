/* Packed descriptors of sinks (frame.py), hundreds of which come with a call: checked in one go.
 *
 * survey_twin in sinks.py is the oracle of the test. Limited API, no state.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "packed.h"

/* The region's size in bytes, noted in `used`; -1 if it is not there, -2 on error. */
static int64_t size_of(uint32_t region, PyObject *regions, PyObject *used) {
    PyObject *id = PyLong_FromUnsignedLong(region);
    if (id == NULL) return -2;
    PyObject *view = PyDict_GetItemWithError(regions, id);
    int64_t size = view != NULL ? PyObject_Size(view) : PyErr_Occurred() ? -2 : -1;
    if (size >= 0 && PyDict_SetItem(used, id, view) < 0) size = -2;
    Py_DECREF(id);
    return PyErr_Occurred() ? -2 : size;
}

static PyObject *survey(PyObject *self, PyObject *args) {
    Py_buffer packed;
    PyObject *regions, *used, *answer = NULL;
    if (!PyArg_ParseTuple(args, "y*O!", &packed, &PyDict_Type, &regions)) return NULL;
    if ((used = PyDict_New()) == NULL) {
        PyBuffer_Release(&packed);
        return NULL;
    }
    Py_ssize_t count = packed.len / (Py_ssize_t)sizeof(struct descriptor), bad = -1, i = 0;
    uint64_t total = 0, streamed = 0;
    uint32_t known = 0;
    int64_t size = 0;
    for (; i < count; i++) {
        struct descriptor sink;
        memcpy(&sink, (char *)packed.buf + i * (Py_ssize_t)sizeof sink, sizeof sink);
        total += sink.bytes;
        if (sink.region == STREAMED) {
            streamed += sink.bytes;
            continue;
        }
        if (sink.region != known) {
            size = size_of(sink.region, regions, used);
            if (size == -2) break;
            known = size < 0 ? 0 : sink.region;
        }
        if (size < 0 || sink.offset > (uint64_t)size || sink.bytes > (uint64_t)size - sink.offset)
            bad = bad < 0 ? i : bad;
    }
    if (i == count) answer = Py_BuildValue("KKnO", (unsigned long long)total, (unsigned long long)streamed, bad, used);
    Py_DECREF(used);
    PyBuffer_Release(&packed);
    return answer;
}

static PyMethodDef methods[] = {
    {"survey", survey, METH_VARARGS, "(bytes of all, of those streamed, first bad one, regions used)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_sinks", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__sinks(void) { return PyModule_Create(&module); }
