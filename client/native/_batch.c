/* A batch of submission entries (layout.py) becomes calls to storage services, and their answers
 * completions: the loops over entries that batch.py would otherwise have to run in Python.
 *
 * Whatever is not plain is left to Python, which says why; it decides nothing for good. The twins
 * in tests/unit/batch_twin.py are the oracle. Limited API, no state.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "../../fabric/packed.h"
#include "../../proto/packed.h"
#include "packed.h"

#define PACKED struct __attribute__((packed))

enum { READ = 0, LEAN = 8, OPERATIONS_MAX = 256, WIDTH_MAX = 16 };
enum { NOT_READ = 0, PLANNED, GATHERED, TAKEN };        /* states of a plan */
enum { SMALL_BYTES = 16 << 10, CROWD = 32 };            /* see gather_small */
#define OFFSET_MAX ((uint64_t)1 << 63)

PACKED region { uint32_t id; uint64_t bytes; };                             /* holdings.py */
PACKED file { uint64_t inode, chunks, chunk_bytes, end; };                  /* batch.py, FILE */
PACKED table { uint32_t chains, width; };                                   /* packedread.py */
PACKED replica { uint32_t target, version, node; };

struct span { uint32_t file; uint64_t start, stop; };

/* What a dict has for a number: 1, 0 if nothing, -1 on error. The value is borrowed. */
static int found(PyObject *dict, uint32_t number, PyObject **value) {
    PyObject *key = PyLong_FromUnsignedLong(number);
    if (key == NULL) return -1;
    *value = PyDict_GetItemWithError(dict, key);
    Py_DECREF(key);
    return *value != NULL ? 1 : PyErr_Occurred() ? -1 : 0;
}

static int facts(PyObject *value, void *to, size_t bytes) {
    char *from;
    Py_ssize_t have;
    if (PyBytes_AsStringAndSize(value, &from, &have) < 0) return -1;
    if ((size_t)have < bytes) {
        PyErr_SetString(PyExc_ValueError, "facts are too short");
        return -1;
    }
    memcpy(to, from, bytes);
    return 0;
}

/* ------------------------------------------------------------ what there is to read */

static int is_sound(const struct entry *entry, uint64_t region_bytes) {
    return entry->operation == READ && entry->flags == 0 && entry->length != 0 && entry->length <= LENGTH_MAX &&
           entry->offset < OFFSET_MAX && entry->start <= region_bytes && entry->length <= region_bytes - entry->start;
}

/* Note what is read of a file; how many files there are then. */
static Py_ssize_t note(struct span *spans, Py_ssize_t count, const struct entry *entry) {
    uint64_t stop = entry->offset + entry->length;
    for (Py_ssize_t i = count - 1; i >= 0; i--) {
        if (spans[i].file != entry->file) continue;
        if (entry->offset < spans[i].start) spans[i].start = entry->offset;
        if (stop > spans[i].stop) spans[i].stop = stop;
        return count;
    }
    spans[count].file = entry->file;
    spans[count].start = entry->offset;
    spans[count].stop = stop;
    return count + 1;
}

static PyObject *spans_as_list(const struct span *spans, Py_ssize_t count) {
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *one = Py_BuildValue("IKK", spans[i].file, (unsigned long long)spans[i].start,
                                      (unsigned long long)spans[i].stop);
        if (one == NULL || PyList_SetItem(list, i, one) < 0) Py_CLEAR(list);
    }
    return list;
}

static PyObject *survey(PyObject *self, PyObject *args) {
    Py_buffer entries;
    PyObject *regions, *value, *list = NULL, *states = NULL, *answer = NULL;
    if (!PyArg_ParseTuple(args, "y*O!", &entries, &PyDict_Type, &regions)) return NULL;
    Py_ssize_t count = entries.len / (Py_ssize_t)sizeof(struct entry), files = 0, i = 0;
    struct span *spans = PyMem_Malloc((size_t)(count + 1) * sizeof *spans);
    states = PyBytes_FromStringAndSize(NULL, count);
    if (spans == NULL) PyErr_NoMemory();
    struct region region = {0, 0};
    uint32_t number = 0;
    int known = 0;
    for (; spans != NULL && states != NULL && i < count; i++) {
        struct entry entry;
        memcpy(&entry, (char *)entries.buf + i * (Py_ssize_t)sizeof entry, sizeof entry);
        if (!known || entry.region != number) {
            known = found(regions, entry.region, &value);
            number = entry.region;
            if (known < 0 || (known && facts(value, &region, sizeof region) < 0)) break;
        }
        int sound = known && is_sound(&entry, region.bytes);
        PyBytes_AsString(states)[i] = (char)sound;
        if (sound) files = note(spans, files, &entry);
    }
    if (spans != NULL && states != NULL && i == count && (list = spans_as_list(spans, files)) != NULL)
        answer = PyTuple_Pack(2, states, list);
    Py_XDECREF(list);
    Py_XDECREF(states);
    PyMem_Free(spans);
    PyBuffer_Release(&entries);
    return answer;
}

/* ------------------------------------------------------------ who is asked */

struct plan {
    struct operation operation;
    struct descriptor sink;
    uint32_t node, region, count;
    const char *replicas; /* that serve its chain: so many */
    char state;
};

struct planner {
    PyObject *regions, *files;
    const uint32_t *costs;
    Py_ssize_t nodes;
    uint32_t file_number, region_number;
    int file_known, region_known;
    struct file file;
    struct region region;
    const char *table;
    Py_ssize_t table_bytes;
};

/* The replica whose turn it is, unless another is much less busy (chunkread.py, _choose). */
static uint32_t choose(const struct planner *planner, const struct replica *replicas, uint32_t count, uint32_t spread) {
    uint32_t first = spread % count, best = first;
    uint32_t cost = planner->costs[replicas[first].node];
    for (uint32_t step = 1; cost > LEAN && step < count; step++) {
        uint32_t other = (first + step) % count, its = planner->costs[replicas[other].node];
        if ((uint64_t)its + LEAN < planner->costs[replicas[best].node]) best = other;
    }
    return best;
}

static void ask(struct plan *plan, const struct replica *replica) {
    plan->operation.target = replica->target;
    plan->operation.chain_version = replica->version;
    plan->node = replica->node;
}

static int use_file(struct planner *planner, uint32_t number) {
    PyObject *value;
    if (planner->file_known && planner->file_number == number) return 1;
    planner->file_known = found(planner->files, number, &value);
    planner->file_number = number;
    if (planner->file_known <= 0) return planner->file_known;
    PyObject *head = PyTuple_GetItem(value, 0), *table = PyTuple_GetItem(value, 1);
    if (head == NULL || table == NULL || facts(head, &planner->file, sizeof planner->file) < 0) return -1;
    return PyBytes_AsStringAndSize(table, (char **)&planner->table, &planner->table_bytes) < 0 ? -1 : 1;
}

static int use_region(struct planner *planner, uint32_t number) {
    PyObject *value;
    if (planner->region_known && planner->region_number == number) return 1;
    planner->region_known = found(planner->regions, number, &value);
    planner->region_number = number;
    if (planner->region_known <= 0) return planner->region_known;
    return facts(value, &planner->region, sizeof planner->region) < 0 ? -1 : 1;
}

/* Plan one entry whose file and region are in use; 0 if Python is to read it. */
static int plan_one(struct planner *planner, const struct entry *entry, struct plan *plan) {
    const struct file *file = &planner->file;
    struct table table;
    if ((size_t)planner->table_bytes < sizeof table || file->chunk_bytes == 0) return 0;
    memcpy(&table, planner->table, sizeof table);
    uint64_t stop = entry->offset + entry->length, index = entry->offset / file->chunk_bytes;
    uint64_t within = entry->offset % file->chunk_bytes;
    size_t stride = sizeof(uint32_t) + table.width * sizeof(struct replica);
    if (stop > file->end || within + entry->length > file->chunk_bytes || index > UINT32_MAX) return 0;
    if (table.chains == 0 || sizeof table + table.chains * stride > (size_t)planner->table_bytes) return 0;
    const char *chain = planner->table + sizeof table + index % table.chains * stride;
    struct replica replicas[WIDTH_MAX];
    uint32_t count;
    memcpy(&count, chain, sizeof count);
    if (count == 0 || count > table.width || count > WIDTH_MAX) return 0;
    plan->replicas = chain + sizeof count;
    plan->count = count;
    memcpy(replicas, plan->replicas, count * sizeof *replicas);
    for (uint32_t i = 0; i < count; i++)
        if (replicas[i].node >= (uint64_t)planner->nodes) return 0;
    uint32_t spread = (uint32_t)((file->inode * 2654435761u + index) & 0x7FFFFFFF);
    ask(plan, &replicas[choose(planner, replicas, count, spread)]);
    uint64_t chunks = __builtin_bswap64(file->chunks); /* big-endian, proto/ids.py */
    uint32_t place = __builtin_bswap32((uint32_t)index);
    memcpy(plan->operation.chunk, &chunks, sizeof chunks);
    memcpy(plan->operation.chunk + sizeof chunks, &place, sizeof place);
    plan->operation.offset = (uint32_t)within;
    plan->operation.length = entry->length;
    plan->sink.region = planner->region.id;
    plan->sink.offset = entry->start;
    plan->sink.bytes = entry->length;
    plan->region = entry->region;
    return 1;
}

/* The replica of a plan that is at a node; 0 if none is. */
static int replica_at(const struct plan *plan, uint32_t node, struct replica *replica) {
    for (uint32_t i = 0; i < plan->count; i++) {
        memcpy(replica, plan->replicas + i * sizeof *replica, sizeof *replica);
        if (replica->node == node) return 1;
    }
    return 0;
}

/* The node that serves most of what is PLANNED and small, from `turn` on; -1 if none does. */
static int64_t most_useful(const struct planner *planner, const struct plan *plans, Py_ssize_t count, uint32_t turn, uint32_t busy) {
    Py_ssize_t most = 0;
    int64_t best = -1;
    struct replica replica;
    for (Py_ssize_t i = 0; i < planner->nodes; i++) {
        uint32_t node = (uint32_t)((turn + (uint64_t)i) % (uint64_t)planner->nodes);
        Py_ssize_t serves = 0;
        if (planner->costs[node] > busy) continue;
        for (Py_ssize_t j = 0; j < count; j++)
            serves += plans[j].state == PLANNED && plans[j].sink.bytes <= SMALL_BYTES && replica_at(&plans[j], node, &replica);
        if (serves > most) {
            most = serves;
            best = node;
        }
    }
    return best;
}

/* How many nodes the small reads are for, and how many these are. */
static Py_ssize_t spread_of(const struct planner *planner, const struct plan *plans, Py_ssize_t count, Py_ssize_t *small) {
    Py_ssize_t nodes = 0;
    *small = 0;
    for (Py_ssize_t node = 0; node < planner->nodes; node++) {
        Py_ssize_t here = 0;
        for (Py_ssize_t i = 0; i < count; i++)
            here += plans[i].state == PLANNED && plans[i].sink.bytes <= SMALL_BYTES && plans[i].node == node;
        nodes += here > 0;
        *small += here;
    }
    return nodes;
}

/* A call costs as much as dozens of small reads: a batch of few is not spread over many nodes, but
 * over the fewest that serve it. The batches take turns. */
static void gather_small(const struct planner *planner, struct plan *plans, Py_ssize_t count, uint32_t turn) {
    Py_ssize_t small, nodes = spread_of(planner, plans, count, &small);
    if (nodes < 2 || small >= CROWD * nodes) return;
    uint32_t busy = UINT32_MAX;
    for (Py_ssize_t i = 0; i < planner->nodes; i++)
        if (planner->costs[i] < busy) busy = planner->costs[i];
    busy = busy > UINT32_MAX - LEAN ? UINT32_MAX : busy + LEAN;
    for (int64_t node; (node = most_useful(planner, plans, count, turn, busy)) >= 0;)
        for (Py_ssize_t i = 0; i < count; i++) {
            struct replica replica;
            if (plans[i].state != PLANNED || plans[i].sink.bytes > SMALL_BYTES) continue;
            if (!replica_at(&plans[i], (uint32_t)node, &replica)) continue;
            ask(&plans[i], &replica);
            plans[i].state = GATHERED;
        }
}

/* The regions, by number, of `count` plans, each once. */
static PyObject *regions_of(const struct plan *plans, const uint32_t *places, Py_ssize_t count) {
    PyObject *numbers = PyList_New(0);
    for (Py_ssize_t i = 0; numbers != NULL && i < count; i++) {
        uint32_t number = plans[places[i]].region;
        if (i > 0 && plans[places[i - 1]].region == number) continue;
        PyObject *one = PyLong_FromUnsignedLong(number);
        int there = one == NULL ? -1 : PySequence_Contains(numbers, one);
        if (there < 0 || (there == 0 && PyList_Append(numbers, one) < 0)) Py_CLEAR(numbers);
        Py_XDECREF(one);
    }
    return numbers;
}

/* One call: (node, operations, sinks, places, bytes, regions) of these plans. */
static PyObject *call_of(const struct plan *plans, const uint32_t *places, Py_ssize_t count, uint64_t bytes) {
    PyObject *body = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(struct operation));
    PyObject *sinks = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(struct descriptor));
    PyObject *regions = regions_of(plans, places, count), *call = NULL;
    if (body != NULL && sinks != NULL && regions != NULL) {
        for (Py_ssize_t i = 0; i < count; i++) {
            const struct plan *plan = &plans[places[i]];
            memcpy(PyBytes_AsString(body) + i * (Py_ssize_t)sizeof plan->operation, &plan->operation, sizeof plan->operation);
            memcpy(PyBytes_AsString(sinks) + i * (Py_ssize_t)sizeof plan->sink, &plan->sink, sizeof plan->sink);
        }
        call = Py_BuildValue("IOOy#KO", plans[places[0]].node, body, sinks, (const char *)places,
                             count * (Py_ssize_t)sizeof *places, (unsigned long long)bytes, regions);
    }
    Py_XDECREF(body);
    Py_XDECREF(sinks);
    Py_XDECREF(regions);
    return call;
}

/* Everything that is planned, by node, in calls that are not too large. */
static int group(struct plan *plans, Py_ssize_t count, uint64_t bytes_max, uint32_t *places, PyObject *calls) {
    for (Py_ssize_t i = 0; i < count; i++) {
        if (plans[i].state == NOT_READ || plans[i].state == TAKEN) continue;
        Py_ssize_t some = 0;
        uint64_t bytes = 0;
        for (Py_ssize_t j = i; j < count && some < OPERATIONS_MAX; j++) {
            if (plans[j].state == NOT_READ || plans[j].state == TAKEN || plans[j].node != plans[i].node) continue;
            if (some > 0 && bytes + plans[j].sink.bytes > bytes_max) break;
            bytes += plans[j].sink.bytes;
            plans[j].state = TAKEN;
            places[some++] = (uint32_t)j;
        }
        PyObject *call = call_of(plans, places, some, bytes);
        if (call == NULL || PyList_Append(calls, call) < 0) {
            Py_XDECREF(call);
            return -1;
        }
        Py_DECREF(call);
    }
    return 0;
}

static int plan_all(struct planner *planner, const char *entries, const char *states, struct plan *plans, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        struct entry entry;
        if (!states[i]) continue;
        memcpy(&entry, entries + i * (Py_ssize_t)sizeof entry, sizeof entry);
        int known = use_file(planner, entry.file);
        if (known > 0) known = use_region(planner, entry.region);
        if (known < 0) return -1;
        plans[i].state = known && plan_one(planner, &entry, &plans[i]) ? PLANNED : NOT_READ;
    }
    return 0;
}

static PyObject *plan(PyObject *self, PyObject *args) {
    Py_buffer entries, states, costs;
    struct planner planner = {0};
    unsigned long long bytes_max;
    unsigned int turn;
    PyObject *calls = NULL, *answer = NULL;
    if (!PyArg_ParseTuple(args, "y*y*O!O!y*KI", &entries, &states, &PyDict_Type, &planner.regions, &PyDict_Type,
                          &planner.files, &costs, &bytes_max, &turn))
        return NULL;
    Py_ssize_t count = states.len, left = 0;
    planner.costs = costs.buf;
    planner.nodes = costs.len / (Py_ssize_t)sizeof(uint32_t);
    struct plan *plans = PyMem_Calloc((size_t)count + 1, sizeof *plans);
    uint32_t *places = PyMem_Calloc((size_t)count + 1, sizeof *places);
    if (plans == NULL || places == NULL)
        PyErr_NoMemory();
    else if (entries.len != count * (Py_ssize_t)sizeof(struct entry))
        PyErr_SetString(PyExc_ValueError, "one state for each entry");
    else if ((calls = PyList_New(0)) != NULL && plan_all(&planner, entries.buf, states.buf, plans, count) == 0) {
        gather_small(&planner, plans, count, turn);
        if (group(plans, count, bytes_max, places, calls) < 0) Py_CLEAR(calls);
    }
    if (calls != NULL && !PyErr_Occurred()) {
        for (Py_ssize_t i = 0; i < count; i++)
            if (plans[i].state == NOT_READ) places[left++] = (uint32_t)i;
        answer = Py_BuildValue("Oy#", calls, (const char *)places, left * (Py_ssize_t)sizeof *places);
    }
    Py_XDECREF(calls);
    PyMem_Free(places);
    PyMem_Free(plans);
    PyBuffer_Release(&costs);
    PyBuffer_Release(&states);
    PyBuffer_Release(&entries);
    return answer;
}

/* ------------------------------------------------------------ what became of it */

struct settled {
    struct completion *completions;
    uint32_t *shorts, *failed;
    Py_ssize_t done, cut, bad;
};

static void settle_all(const char *entries, const uint32_t *places, const char *results, const uint32_t *filled,
                       Py_ssize_t count, struct settled *to) {
    for (Py_ssize_t i = 0; i < count; i++) {
        struct entry entry;
        struct result result;
        memcpy(&entry, entries + places[i] * sizeof entry, sizeof entry);
        memcpy(&result, results + i * (Py_ssize_t)sizeof result, sizeof result);
        uint32_t sent = filled == NULL ? entry.length : filled[i];
        if (result.code != 0 || result.length > sent || result.length > entry.length) {
            to->failed[to->bad++] = places[i];
        } else if (result.length < entry.length) {
            to->shorts[to->cut++] = places[i];
            to->shorts[to->cut++] = result.length;
        } else {
            to->completions[to->done].user_data = entry.user_data;
            to->completions[to->done++].result = entry.length;
        }
    }
}

static PyObject *settle(PyObject *self, PyObject *args) {
    Py_buffer entries, places, results, filled;
    struct settled to = {0};
    PyObject *answer = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*y*", &entries, &places, &results, &filled)) return NULL;
    Py_ssize_t count = places.len / 4, sound = filled.len == 0 || filled.len == places.len;
    for (Py_ssize_t i = 0; i < count; i++)
        sound &= ((const uint32_t *)places.buf)[i] < (uint64_t)entries.len / sizeof(struct entry);
    char *memory = PyMem_Malloc((size_t)count * (sizeof(struct completion) + 3 * sizeof(uint32_t)) + 1);
    if (memory == NULL) {
        PyErr_NoMemory();
    } else if (!sound || results.len != count * (Py_ssize_t)sizeof(struct result)) {
        PyErr_SetString(PyExc_ValueError, "as many results as places");
    } else {
        to.completions = (struct completion *)memory;
        to.shorts = (uint32_t *)(to.completions + count);
        to.failed = to.shorts + 2 * count;
        settle_all(entries.buf, places.buf, results.buf, filled.len ? filled.buf : NULL, count, &to);
        answer = Py_BuildValue("y#y#y#", memory, to.done * (Py_ssize_t)sizeof *to.completions, (char *)to.shorts,
                               to.cut * 4, (char *)to.failed, to.bad * 4);
    }
    PyMem_Free(memory);
    PyBuffer_Release(&filled);
    PyBuffer_Release(&results);
    PyBuffer_Release(&places);
    PyBuffer_Release(&entries);
    return answer;
}

static PyMethodDef methods[] = {
    {"survey", survey, METH_VARARGS, "(1 for each entry that is a sound read, what is read of which files)."},
    {"plan", plan, METH_VARARGS, "(calls, places of entries that are left)."},
    {"settle", settle, METH_VARARGS, "(completions, places and lengths of short ones, places that failed)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_batch", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__batch(void) { return PyModule_Create(&module); }
