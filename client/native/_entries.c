/* Entries as an application makes them and completions as it takes them (layout.py): the loops of
 * ring.py over hundreds. The twins in tests/unit/batch_twin.py are the oracle. Limited API, no state.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "packed.h"

/* What was looked up for the entry before; borrowed from the arguments. */
struct known {
    PyObject *file, *region;
    uint32_t file_number, region_number;
};

static int number_of(PyObject *object, const char *attribute, uint32_t *number) {
    PyObject *value = PyObject_GetAttrString(object, attribute);
    unsigned long found = value == NULL ? (unsigned long)-1 : PyLong_AsUnsignedLong(value);
    Py_XDECREF(value);
    *number = (uint32_t)found;
    return PyErr_Occurred() ? -1 : 0;
}

static int region_number(PyObject *region, PyObject *numbers, uint32_t *number) {
    PyObject *id = PyObject_GetAttrString(region, "id");
    PyObject *found = id == NULL ? NULL : PyDict_GetItemWithError(numbers, id);
    if (found != NULL)
        *number = (uint32_t)PyLong_AsUnsignedLong(found);
    else if (id != NULL && !PyErr_Occurred())
        PyErr_SetObject(PyExc_KeyError, id);
    Py_XDECREF(id);
    return PyErr_Occurred() ? -1 : 0;
}

/* One entry; 0 if its numbers cannot be, -1 on error. */
static int pack_one(PyObject *wanted, PyObject *part, PyObject *numbers, struct known *known, struct entry *entry) {
    if (!PyTuple_Check(wanted) || PyTuple_Size(wanted) != 3 || !PyTuple_Check(part) || PyTuple_Size(part) != 3) {
        PyErr_SetString(PyExc_TypeError, "(file, offset, memory) is wanted for each entry");
        return -1;
    }
    PyObject *file = PyTuple_GetItem(wanted, 0), *region = PyTuple_GetItem(part, 0);
    long long offset = PyLong_AsLongLong(PyTuple_GetItem(wanted, 1));
    if (offset == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return -1;
        PyErr_Clear();
    }
    long long length = PyLong_AsLongLong(PyTuple_GetItem(part, 2));
    entry->start = PyLong_AsUnsignedLongLong(PyTuple_GetItem(part, 1));
    if (PyErr_Occurred()) return -1;
    if (offset < 0 || length <= 0 || length > LENGTH_MAX) return 0;
    if (file != known->file && number_of(file, "number", &known->file_number) < 0) return -1;
    known->file = file;
    if (region != known->region && region_number(region, numbers, &known->region_number) < 0) return -1;
    known->region = region;
    entry->file = known->file_number;
    entry->region = known->region_number;
    entry->offset = (uint64_t)offset;
    entry->length = (uint32_t)length;
    return 1;
}

static PyObject *pack(PyObject *self, PyObject *args) {
    PyObject *wanted, *parts, *numbers, *refused = NULL, *answer = NULL;
    unsigned int operation;
    unsigned long long user_data;
    if (!PyArg_ParseTuple(args, "O!O!O!IK", &PyList_Type, &wanted, &PyList_Type, &parts, &PyDict_Type, &numbers,
                          &operation, &user_data))
        return NULL;
    Py_ssize_t count = PyList_Size(wanted), packed = 0, i = 0;
    struct known known = {0};
    struct entry *entries = PyMem_Calloc((size_t)count + 1, sizeof *entries);
    if (entries == NULL) return PyErr_NoMemory();
    if (PyList_Size(parts) != count)
        PyErr_SetString(PyExc_ValueError, "one part of memory for each");
    else
        refused = PyList_New(0);
    for (; refused != NULL && i < count; i++) {
        int sound = pack_one(PyList_GetItem(wanted, i), PyList_GetItem(parts, i), numbers, &known, &entries[packed]);
        if (sound < 0) break;
        entries[packed].user_data = user_data | (uint64_t)i;
        entries[packed].operation = operation;
        packed += sound;
        PyObject *place = sound ? NULL : PyLong_FromSsize_t(i);
        if (!sound && (place == NULL || PyList_Append(refused, place) < 0)) {
            Py_XDECREF(place);
            break;
        }
        Py_XDECREF(place);
    }
    if (refused != NULL && i == count)
        answer = Py_BuildValue("y#O", (char *)entries, packed * (Py_ssize_t)sizeof *entries, refused);
    Py_XDECREF(refused);
    PyMem_Free(entries);
    return answer;
}

/* The results of the batch that completions are noted in. */
struct noted {
    uint32_t number;
    Py_ssize_t count;
    PyObject *results; /* held */
};

static int end_run(struct noted *noted, PyObject *counts) {
    if (noted->results == NULL) return 0;
    Py_CLEAR(noted->results);
    PyObject *one = Py_BuildValue("In", noted->number, noted->count);
    int failed = one == NULL || PyList_Append(counts, one) < 0;
    Py_XDECREF(one);
    return failed ? -1 : 0;
}

static int begin_run(struct noted *noted, uint32_t number, PyObject *batches) {
    PyObject *key = PyLong_FromUnsignedLong(number);
    PyObject *batch = key == NULL ? NULL : PyDict_GetItemWithError(batches, key);
    if (batch == NULL && key != NULL && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
    Py_XDECREF(key);
    if (batch == NULL) return -1;
    noted->number = number;
    noted->count = 0;
    noted->results = PyObject_GetAttrString(batch, "results");
    return noted->results == NULL ? -1 : 0;
}

static int note(const struct completion *one, struct noted *noted, PyObject *batches, PyObject *counts, PyObject *failed) {
    uint32_t number = (uint32_t)(one->user_data >> 32), place = (uint32_t)one->user_data;
    if (noted->results == NULL || noted->number != number)
        if (end_run(noted, counts) < 0 || begin_run(noted, number, batches) < 0) return -1;
    if (one->result < 0) {
        PyObject *problem = Py_BuildValue("IIL", number, place, (long long)one->result);
        int lost = problem == NULL || PyList_Append(failed, problem) < 0;
        Py_XDECREF(problem);
        return lost ? -1 : 0;
    }
    PyObject *bytes = PyLong_FromLongLong(one->result);
    if (bytes == NULL || PyList_SetItem(noted->results, place, bytes) < 0) return -1;
    noted->count++;
    return 0;
}

static PyObject *settle(PyObject *self, PyObject *args) {
    Py_buffer completions;
    PyObject *batches, *answer = NULL;
    if (!PyArg_ParseTuple(args, "y*O!", &completions, &PyDict_Type, &batches)) return NULL;
    PyObject *counts = PyList_New(0), *failed = PyList_New(0);
    struct noted noted = {0};
    Py_ssize_t count = completions.len / (Py_ssize_t)sizeof(struct completion), i = 0;
    for (; counts != NULL && failed != NULL && i < count; i++) {
        struct completion one;
        memcpy(&one, (char *)completions.buf + i * (Py_ssize_t)sizeof one, sizeof one);
        if (note(&one, &noted, batches, counts, failed) < 0) break;
    }
    if (counts != NULL && failed != NULL && i == count && end_run(&noted, counts) == 0)
        answer = PyTuple_Pack(2, counts, failed);
    Py_XDECREF(noted.results);
    Py_XDECREF(failed);
    Py_XDECREF(counts);
    PyBuffer_Release(&completions);
    return answer;
}

static PyMethodDef methods[] = {
    {"pack", pack, METH_VARARGS, "(packed entries, places of those that cannot be)."},
    {"settle", settle, METH_VARARGS, "(how many completions of which batches are noted, those that failed)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_entries", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__entries(void) { return PyModule_Create(&module); }
