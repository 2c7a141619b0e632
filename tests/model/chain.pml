/* The replication protocol of one chunk on one chain, for spin. See README.md; run.py drives it.

   Rule here                          product
   move_on, forward, take, adopt,     storage/craq.py ChunkMachine: _move_on, _forward, _take, _on_routing,
     begin_client, begin_hop, join      _begin_client, _begin_hop, _twin; _lost_place; _on_forward_answered, _failed
   LEFTOVER, act 11                   craq._begin_leftover, target.py FinishLeftovers
   PLAN_*, Readers                    storage/readrule.py plan_read, settle_read; reads.py _check, version
   overtake                           storage/forward.py ReplaceOrder
   HEAD, TAIL, SUCC, WRITABLE         storage/view.py, proto/cluster.py Chain
   sess, act 13-19                    storage/filling.py Recovery, resync.compare, service.sync
   evaluate                           mgmtd/chain.py next_chain, run until it settles as membership._evaluate does
   Mgmtd, DEAD, ENTERS, TELLS         mgmtd/membership.py _tick, _register, _heartbeat, _local_state
   lease, needs, LEASE_OK             client/agent.py Agent, storage/server.py _lease_ok
   Writer                             client/chunkwrite.py ChunkWriter (same tag again), nodecalls still_good

   Left out, and why that hides nothing (bounds apart):
   - Many chunks and chains: the machine is per chunk; only routing, lease and recovery are shared,
     and recovery sends chunk by chunk under the chunk's lock.
   - Content is which writes are in it and the last one. A write is applied to what its replica has,
     so that a replica that missed one can be told. Remembered tags are those of the writes in it:
     records hold both in one batch. Limit: 16 writers remembered per chunk.
   - A step between two durable effects is one action: everything before it is a crash of before.
     PREPARE is an action of its own, since it may last (thread, disk) while all else goes on.
   - Queues: an operation that waits for the chunk is a message that has not arrived. Arrival checks
     are made again at the beginning (craq._begin), except the lease of a client's update, which is
     therefore never checked here: more runs, not fewer.
   - Network between replicas and from clients: any delay and reordering; a caller that gives up
     leaves its request (or the answer) on the way, its next try is the duplicate. A message dies
     with the receiving process (connection), not with the sender. At most SLOTS requests to one
     replica; a third one that is late is lost. Loss is delay for ever.
   - Clients' routing: any version that they may still have. A read at a replica without dispute
     begins and ends in one step at any moment, by any client: every longer read is allowed more.
   - A lease is a bit. It runs out only while the replica is cut off or dead, and mgmtd buries only
     after that (half a lease against a whole one; monotonic clocks that run alike). A cut is between
     one replica and mgmtd, both ways, routing included.
   - Heartbeats and their answers are one step: only lease and UPTODATE on the current chain version
     matter, and both are void when stale (incarnation, chain version).
   - mgmtd is one that does not fail: what it publishes is durable; its own restart only delays.
   - A try that is certain to be refused again is not made, so that every run ends: fairness is then
     not needed, and "ends" below means every run of the bound, with the bound's faults.
   - Not modelled: creation, removal, truncation, NO_SPACE, damaged data, power cuts and lost disks
     (DISTRUSTED), repair, flush. The simulator covers these.

   Properties: observe(), check_commit(), never_lost(), the asserts in begin_client(), and those of
   World when nothing more can happen. */

#ifndef CRASHES
#define CRASHES 1          /* process deaths (each followed by a restart, some time) */
#endif
#ifndef CUTS
#define CUTS 0             /* partitions of a replica from mgmtd (each healed, some time) */
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 0         /* a caller gives up waiting; its message or the answer is late or lost */
#endif
#ifndef GIVEUPS
#define GIVEUPS 0          /* a client gives up a write and goes on to its next one */
#endif
#ifndef WRITES
#define WRITES 2           /* 1..3 updates of the chunk in all */
#endif
#ifndef WRITERS
#define WRITERS 1          /* 1: one client does them in a row; 2: the last one is of another client */
#endif
#ifndef REPLICAS
#define REPLICAS 3
#endif
#define KMAX 14            /* chain versions; asserted */

#define NONE 3
#define SLOTS 2            /* requests in flight to one replica from others; asserted below */
#define CSLOTS 3           /* requests of clients in flight */

/* public states: proto/cluster.py, in GROUP_ORDER */
#define SERVING 0
#define LASTSRV 1
#define SYNCING 2
#define WAITING 3
#define OFFLINE 4

/* phases: craq.Phase */
#define IDLE 0
#define PREPARE 1
#define FORWARD 2
#define PAUSE 3
#define HELD 4

/* kinds of operations and messages */
#define CHANGE 1           /* an update as the client sent it */
#define REPLACE 2          /* whole content */
#define LEFTOVER 3
#define CLIENT 4

/* answers */
#define OK 1
#define FAILED 2
#define GAP 3

/* Content: which updates are in it (bits 0-2) and which was the last one (bits 3-4). */
#define BIT(id) (1 << ((id) - 1))
#define APPLY(val, id) (((val) & 7) | BIT(id) | ((id) << 3))
#define HAS(val, id) (((val) & BIT(id)) != 0)
#define LAST(val) ((val) >> 3)
#define WRITER(id) ((WRITERS == 2 && (id) == WRITES) -> 1 : 0)
#define FIRST_OF(w) ((w) == 0 -> 1 : WRITES)
#define LAST_OF(w) ((w) == 1 -> WRITES : WRITES - (WRITERS - 1))
/* A later write of the same channel is in the content. */
#define NEWER_IN(val, id) (WRITER(id) == 0 && \
    (((id) == 1 && WRITES - (WRITERS - 1) >= 2 && HAS(val, 2)) || \
     ((id) <= 2 && WRITES - (WRITERS - 1) >= 3 && HAS(val, 3))))

typedef Row { byte ord[3]; byte st[3] };   /* one version of the chain: order, state by replica */
Row hist[KMAX + 1];
byte cur = 1;                              /* mgmtd: the current version of the chain */
bit alive[3];                              /* mgmtd: node.alive */

/* views: storage/view.py. `k` is the version that somebody knows. */
#define ST(i, k) hist[k].st[i]
#define ORD(p, k) hist[k].ord[p]
#define SERVES(i, k) (ST(i, k) == SERVING)
#define WRITABLE(i, k) (ST(i, k) == SERVING || ST(i, k) == SYNCING)
#define HEAD(k) (SERVES(ORD(0, k), k) -> ORD(0, k) : NONE)
#define TAIL(k) (SERVES(ORD(2, k), k) -> ORD(2, k) : (SERVES(ORD(1, k), k) -> ORD(1, k) : HEAD(k)))
#ifdef MUT_SKIP_SYNCING
#define TAKES(i, k) SERVES(i, k)
#else
#define TAKES(i, k) WRITABLE(i, k)
#endif
#define SUCC(i, k) ((ORD(0, k) == (i) && WRITABLE(i, k) && TAKES(ORD(1, k), k)) -> ORD(1, k) : \
    ((ORD(1, k) == (i) && WRITABLE(i, k) && TAKES(ORD(2, k), k)) -> ORD(2, k) : NONE))
#define SYNC_SUCC(i, k) ((ORD(0, k) == (i) && ST(ORD(1, k), k) == SYNCING) -> ORD(1, k) : \
    ((ORD(1, k) == (i) && ST(ORD(2, k), k) == SYNCING) -> ORD(2, k) : NONE))

/* a replica: process */
bit up[3];
bit cut[3];                                /* no way to mgmtd and back */
bit lease[3];                              /* Agent: not run out yet */
byte rv[3];                                /* chain version known */
byte needs[3];                             /* Agent.needs_version */
byte completed[3];                         /* TargetState.completed_version */
#define LEASE_OK(i) (lease[i] && rv[i] >= needs[i])

/* a replica: chunk on disk */
byte cver[3]; byte cval[3];                /* committed */
byte pver[3]; byte pval[3];                /* pending, 0 for none */
bit pwhole[3];                             /* pending.kind is REPLACE */
bit exposed[3];                            /* ChunkMachine.exposed (memory) */
#ifdef MUT_FORGET_SEQUENCE
bit forgot[3];
#endif

/* a replica: the operation that owns the chunk */
typedef Op { byte ph; byte kind; byte ver; byte val; byte id; byte from; byte to;
             bit commit; bit serving; bit whole; bit live; bit client };
Op op[3];
byte ans[3];                               /* answer to my forward, on its way */

/* a replica: recovery of its successor, filling.Recovery */
byte sess[3];                              /* 0 none 1 settled 2 listed 3 to send 4 sent 5 done */
byte sver[3];                              /* chain version of the session */
byte lver[3]; byte lval[3]; bit lpend[3];  /* the row that the successor listed */

/* requests between replicas; `live`: the sender waits for the answer to this one */
typedef Msg { byte kind; byte from; byte cv; byte ver; byte val; byte id; bit live; bit old };
Msg net[6];
#define AT(i, s) net[(i) * SLOTS + (s)]

/* clients */
typedef Creq { byte id; byte to; byte cv };
Creq creq[CSLOTS];
byte wst[2];                               /* 0 to send, 1 waits, 2 done */
byte wid[2]; byte wto[2]; byte wcv[2];     /* write, asked replica, oldest routing it may use */

/* a read that has asked the tail, on its way back: storage/reads.py */
bit rd; byte rdat; byte rdk; byte rdtail; byte rdlo; byte rdmask;

/* ghosts */
byte gver = 1; byte gval = 0;              /* newest version that anybody was told of */
byte gack = 0;                             /* updates acknowledged */
byte crashes = CRASHES, cuts = CUTS, timeouts = TIMEOUTS, giveups = GIVEUPS;
hidden byte todo;                          /* what the step goes on with */
#define MOVE 1
#define COMMIT 2
#define FINISH 3
#define LOSE 4
byte a, b, n;                              /* scratch, always 0 between steps */
bit good = 0;                              /* the end has been looked at */

/* ---------------------------------------------------------------- properties */

/* (1) Somebody is told version `ver` with content `val`; whatever he may rely on began with `lo`, `mask`. */
inline observe(ver_, val_, lo_, mask_) {
    assert(ver_ >= lo_);                            /* never older than what anybody has seen */
    assert(((val_) & (mask_)) == (mask_));          /* every write acknowledged before is in it */
    assert(ver_ != gver || (val_) == gval);         /* one version has one content */
    if
    :: ver_ > gver ->
        assert(((val_) & gval & 7) == (gval & 7));  /* nothing seen before has gone */
        gver = ver_; gval = val_
    :: else
    fi
}

/* (4) What was acknowledged is held by everybody who serves, or may bring the chain back. */
inline never_lost() {
    a = 0;
    do
    :: a < REPLICAS ->
        assert(ST(a, cur) > LASTSRV ||
               ((cval[a] | (pver[a] != 0 -> pval[a] : 0)) & gack) == gack);
        a++
    :: else -> break
    od;
    a = 0
}

/* (2) A commit of `ver_`, `val_` at i: only forward, and all who serve hold it. */
inline check_commit(i, ver_, val_) {
    if
    :: SERVES(i, rv[i]) ->
        assert(ver_ > cver[i] || (ver_ == cver[i] && (val_) == cval[i]))
    :: else
    fi;
    if
    :: rv[i] == cur && WRITABLE(i, cur) ->
        a = 0;
        do
        :: a < REPLICAS ->
            assert(a == i || !SERVES(a, cur) || cver[a] >= ver_ || pver[a] == ver_);
            a++
        :: else -> break
        od;
        a = 0
    :: else
    fi
}

/* ---------------------------------------------------------------- craq.py */

inline clear_op(i) {
    op[i].ph = IDLE; op[i].kind = 0; op[i].ver = 0; op[i].val = 0; op[i].id = 0;
    op[i].from = NONE; op[i].to = NONE; op[i].commit = 0; op[i].serving = 0;
    op[i].whole = 0; op[i].live = 0; op[i].client = 0;
    exposed[i] = (pver[i] != 0)
}

/* CancelForward, and the end of a process that waits: nobody awaits i's forward any more. */
inline cancel(i) {
    ans[i] = 0; a = 0;
    do
    :: a < 6 ->
        if
        :: net[a].kind && net[a].from == i -> net[a].live = 0
        :: else
        fi;
        a++
    :: else -> break
    od;
    a = 0;
    do
    :: a < REPLICAS ->
        if
        :: op[a].live && op[a].from == i -> op[a].live = 0; op[a].from = NONE
        :: else
        fi;
        a++
    :: else -> break
    od;
    a = 0
}

inline drop(i_, s_) {
    AT(i_, s_).kind = 0; AT(i_, s_).from = 0; AT(i_, s_).cv = 0; AT(i_, s_).ver = 0;
    AT(i_, s_).val = 0; AT(i_, s_).id = 0; AT(i_, s_).live = 0; AT(i_, s_).old = 0
}

/* Put a request on its way to op[i].to. The slots hold what is late; the oldest late one is lost if full. */
inline send(i, kind_, ver_, val_, id_) {
    if
    :: AT(op[i].to, 0).kind && AT(op[i].to, 1).kind ->            /* slot 0 is the older one */
        if
        :: AT(op[i].to, 0).live -> drop(op[i].to, 1)
        :: else ->
            drop(op[i].to, 0)
        fi
    :: else
    fi;
    if
    :: AT(op[i].to, 0).kind == 0 && AT(op[i].to, 1).kind != 0 -> a = 0
    :: AT(op[i].to, 0).kind == 0 && AT(op[i].to, 1).kind == 0 -> a = 0
    :: else -> a = 1
    fi;
    AT(op[i].to, a).kind = kind_; AT(op[i].to, a).from = i; AT(op[i].to, a).cv = rv[i];
    AT(op[i].to, a).ver = ver_; AT(op[i].to, a).val = val_; AT(op[i].to, a).id = id_;
    AT(op[i].to, a).live = 1; AT(op[i].to, a).old = 0;
    a = 0
}

inline acknowledge(i, id_) {
    assert(HAS(cval[i], id_));
    /* An older head may be late to say so: what others were told meanwhile does not bind it. */
    observe(cver[i], cval[i], 0, 0);
    gack = gack | BIT(id_);
    never_lost();
    b = WRITER(id_);
    if
    :: wst[b] == 1 && wid[b] == id_ ->
        wto[b] = NONE;
        if
        :: id_ == LAST_OF(b) -> wst[b] = 2; wcv[b] = 0
        :: else -> wst[b] = 0; wid[b] = id_ + 1
        fi
    :: else
    fi;
    b = 0
}

inline finish_ok(i) {
    if
    :: op[i].client -> acknowledge(i, op[i].id)
    :: else
    fi;
    if
    :: op[i].live -> ans[op[i].from] = OK
    :: else
    fi;
    clear_op(i)
}

/* The pending version stays. The caller hears NOT_SERVING; a client waits for newer routing. */
inline finish_failed(i) {
    if
    :: op[i].client ->
        b = WRITER(op[i].id);
        if
        :: wst[b] == 1 && wid[b] == op[i].id -> wst[b] = 0; wto[b] = NONE; wcv[b] = rv[i]
        :: else
        fi;
        b = 0
    :: else
    fi;
    if
    :: op[i].live -> ans[op[i].from] = FAILED
    :: else
    fi;
    clear_op(i)
}

inline do_commit(i) {
    check_commit(i, pver[i], pval[i]);
    cver[i] = pver[i]; cval[i] = pval[i]; pver[i] = 0; pval[i] = 0; pwhole[i] = 0
}

#ifdef MUT_AS_SERVING
#define LOST_PLACE(i) (!WRITABLE(i, rv[i]))
#else
#define LOST_PLACE(i) (!WRITABLE(i, rv[i]) || (op[i].serving && !SERVES(i, rv[i])))
#endif

inline acknowledge_early(i, id_) {
    gack = gack | BIT(id_);
    b = WRITER(id_);
    if
    :: wst[b] == 1 && wid[b] == id_ ->
        wto[b] = NONE;
        if
        :: id_ == LAST_OF(b) -> wst[b] = 2; wcv[b] = 0
        :: else -> wst[b] = 0; wid[b] = id_ + 1
        fi
    :: else
    fi;
    b = 0
}

inline forward(i) {
    op[i].ph = FORWARD; op[i].to = SUCC(i, rv[i]); exposed[i] = 1;
    if
    :: op[i].whole || op[i].kind == REPLACE || op[i].kind == LEFTOVER || ST(op[i].to, rv[i]) == SYNCING ->
        send(i, REPLACE, pver[i], pval[i], 0)
    :: else ->
        send(i, CHANGE, pver[i], 0, op[i].id)
    fi;
#ifdef MUT_ACK_EARLY
    if
    :: op[i].client -> acknowledge_early(i, op[i].id); op[i].client = 0
    :: else
    fi
#endif
}

/* ChunkMachine._move_on: the update is pending here; what does the chain want next? */
inline move_on(i) {
    if
    :: LOST_PLACE(i) -> todo = LOSE
    :: !LOST_PLACE(i) && SUCC(i, rv[i]) == NONE -> todo = COMMIT
    :: else -> todo = 0; forward(i)
    fi
}

/* ChunkMachine._take. A pending version of ours stays until the other one is there (prepared):
   table.store_pending and commit replace it in one batch. */
inline take(i, kind_, ver_, val_, id_) {
    op[i].ph = PREPARE; op[i].kind = kind_; op[i].ver = ver_; op[i].val = val_; op[i].id = id_;
    op[i].serving = SERVES(i, rv[i]);
    op[i].commit = (SUCC(i, rv[i]) == NONE);
#ifdef BUG_DISCARD_FIRST
    pver[i] = 0; pval[i] = 0; pwhole[i] = 0
#endif
}

/* The store has it. */
inline prepared(i) {
    if
    :: op[i].commit ->
        pver[i] = op[i].ver; pval[i] = op[i].val; todo = COMMIT      /* in one batch */
    :: else ->
        pver[i] = op[i].ver; pval[i] = op[i].val; pwhole[i] = (op[i].kind == REPLACE);
        op[i].ver = 0; op[i].val = 0;
#ifdef MUT_COMMIT_FIRST
        cver[i] = pver[i]; cval[i] = pval[i];
#endif
        todo = MOVE
    fi
}

/* _begin_client. The message has been taken from its slot. */
inline begin_client(i, id_) {
    op[i].client = (wst[WRITER(id_)] == 1 && wid[WRITER(id_)] == id_ && wto[WRITER(id_)] == i);
    op[i].id = id_;
    if
#ifdef MUT_FORGET_SEQUENCE
    :: !forgot[i] && HAS(cval[i], id_) -> todo = FINISH
    :: !forgot[i] && !HAS(cval[i], id_) && NEWER_IN(cval[i], id_) -> todo = LOSE
#elif defined(MUT_NO_DEDUPE)
#elif defined(MUT_NO_SUPERSEDE)
    :: HAS(cval[i], id_) -> todo = FINISH
#else
    :: HAS(cval[i], id_) -> todo = FINISH
    :: !HAS(cval[i], id_) && NEWER_IN(cval[i], id_) -> todo = LOSE     /* SUPERSEDED */
#endif
    :: else ->
        assert(!HAS(cval[i], id_));                 /* (4) exactly once, */
        assert(!NEWER_IN(cval[i], id_));            /*     and never over a newer one */
        take(i, CLIENT, cver[i] + 1, APPLY(cval[i], id_), id_)
    fi
}

/* _begin_hop and _begin of a REPLACE, for the message in slot s. */
inline begin_hop(i, s) {
    op[i].from = AT(i, s).from; op[i].live = AT(i, s).live; op[i].id = AT(i, s).id;
    if
    :: AT(i, s).kind == REPLACE -> take(i, REPLACE, AT(i, s).ver, AT(i, s).val, 0)
    :: AT(i, s).kind == CHANGE && AT(i, s).ver == cver[i] && LAST(cval[i]) == AT(i, s).id ->
        todo = FINISH                                /* its answer was lost on the way */
    :: AT(i, s).kind == CHANGE && !(AT(i, s).ver == cver[i] && LAST(cval[i]) == AT(i, s).id) && AT(i, s).ver != cver[i] + 1 ->
        if
        :: AT(i, s).live -> ans[AT(i, s).from] = GAP
        :: else
        fi;
        op[i].live = 0; clear_op(i)
    :: AT(i, s).kind == CHANGE && AT(i, s).ver == cver[i] + 1 && pver[i] == AT(i, s).ver && LAST(pval[i]) == AT(i, s).id ->
        op[i].kind = CHANGE; op[i].serving = SERVES(i, rv[i]); op[i].whole = pwhole[i];
        todo = MOVE
    :: else ->
        take(i, CHANGE, AT(i, s).ver, APPLY(cval[i], AT(i, s).id), AT(i, s).id)
    fi
}

#ifdef BUG_TOKEN_PER_LIFE
#define SAME_LIFE(i, m, s) (AT(i, m).old == AT(i, s).old)
#else
#define SAME_LIFE(i, m, s) 1
#endif

/* forward.ReplaceOrder.admit: what this REPLACE overtakes will be refused. */
inline overtake(i, s) {
#ifdef MUT_NO_REPLACE_ORDER
    skip
#else
    a = 0;
    do
    :: a < SLOTS ->
        if
        :: a != s && AT(i, a).kind == REPLACE && !AT(i, a).live && AT(i, a).from == AT(i, s).from &&
           SAME_LIFE(i, a, s) && (AT(i, s).live || s > a) -> drop(i, a)
        :: else
        fi;
        a++
    :: else -> break
    od;
    a = 0
#endif
}

#ifdef MUT_IGNORE_CHAIN_VERSION
#define ADMITS(i, k) 1
#define TOO_OLD(i, k) 0
#else
#define ADMITS(i, k) (rv[i] == (k))
#define TOO_OLD(i, k) (rv[i] > (k))
#endif

/* What a message in slot s of replica i leads to. */
#define HOP_READY(i, s) (AT(i, s).kind && ADMITS(i, AT(i, s).cv) && WRITABLE(i, rv[i]) && op[i].ph == IDLE)
#define HOP_TWIN(i, s) (AT(i, s).kind == CHANGE && ADMITS(i, AT(i, s).cv) && WRITABLE(i, rv[i]) && \
    op[i].ph != IDLE && (op[i].kind == CHANGE || op[i].kind == CLIENT) && op[i].id == AT(i, s).id)
#define HOP_REFUSED(i, s) (AT(i, s).kind && (TOO_OLD(i, AT(i, s).cv) || \
    (ADMITS(i, AT(i, s).cv) && !WRITABLE(i, rv[i]))))

inline join(i, s) {
    if
    :: AT(i, s).live -> op[i].live = 1; op[i].from = AT(i, s).from
    :: else
    fi;
    drop(i, s)
}
inline refuse(i, s) {
    if
    :: AT(i, s).live -> ans[AT(i, s).from] = FAILED
    :: else
    fi;
    drop(i, s)
}

/* Rows that nobody can look at any more. */
inline trim() {
    n = cur; a = 0;
    do
    :: a < 3 -> if :: up[a] && rv[a] < n -> n = rv[a] :: else fi; a++
    :: else -> break
    od;
    a = 0;
    do
    :: a < WRITERS -> if :: wst[a] != 2 && wcv[a] < n -> n = wcv[a] :: else fi; a++
    :: else -> break
    od;
    do
    :: n > 1 ->
        n--;
        a = 0;
        do
        :: a < 3 -> hist[n].ord[a] = 0; hist[n].st[a] = 0; a++
        :: else -> break
        od
    :: else -> break
    od;
    a = 0; n = 0
}

/* _on_routing */
inline adopt(i, k) {
    rv[i] = k;
    if
    :: op[i].ph == FORWARD && (op[i].to != SUCC(i, rv[i]) || LOST_PLACE(i)) ->
        cancel(i); todo = MOVE
    :: op[i].ph == PAUSE -> todo = MOVE
    :: else
    fi;
    trim()
}

/* ---------------------------------------------------------------- mgmtd/chain.py, membership.py */

/* Scratch of one evaluation. */
hidden byte was[3]; hidden byte next_[3]; hidden byte line[3];
hidden byte serving_, had, returning_, free_, changed_;
hidden byte p, q;

/* next_chain until it settles. `fresh`: a replica that says UPTODATE on the current version, or NONE. */
inline evaluate(fresh) {
    changed_ = 1;
    do
    :: changed_ ->
        serving_ = 0; had = 0; returning_ = 0; changed_ = 0;
        for (p : 0 .. 2) {
            was[p] = ST(p, cur); next_[p] = OFFLINE;
            had = had || was[p] == SERVING;
            serving_ = serving_ || (was[p] == SERVING && alive[p])
        }
        for (q : 0 .. 2) {
            p = ORD(q, cur);
            if
            :: was[p] == SERVING && alive[p] -> next_[p] = SERVING
#ifdef MUT_LASTSRV_ALWAYS
            :: was[p] == SERVING && !alive[p] -> next_[p] = LASTSRV
#else
            :: was[p] == SERVING && !alive[p] -> next_[p] = (serving_ -> OFFLINE : LASTSRV)
#endif
            :: was[p] == LASTSRV && !had && alive[p] && !returning_ -> returning_ = 1; next_[p] = SERVING
#ifdef MUT_REVIVE_INCOMPLETE
            :: was[p] >= WAITING && !had && alive[p] && !returning_ -> returning_ = 1; next_[p] = SERVING
#endif
            :: else
            fi
        }
        for (p : 0 .. 2) {
            if
#ifdef MUT_LASTSRV_ALWAYS
            :: was[p] == LASTSRV && (serving_ || had) && !alive[p] -> next_[p] = LASTSRV
            :: was[p] == LASTSRV && (serving_ || had) && alive[p] -> next_[p] = SERVING
#endif
            :: was[p] == LASTSRV && !had && !returning_ -> next_[p] = LASTSRV
            :: else
            fi
        }
        free_ = serving_ || returning_;
        for (n : SYNCING .. OFFLINE) {
            for (q : 0 .. 2) {
                p = ORD(q, cur);
                if
                :: was[p] == n && next_[p] == OFFLINE && alive[p] && p == fresh && n == SYNCING && serving_ ->
                    next_[p] = SERVING
                :: was[p] == n && next_[p] == OFFLINE && alive[p] && !(p == fresh && n == SYNCING && serving_) ->
                    next_[p] = (free_ -> SYNCING : WAITING); free_ = 0
                :: else
                fi
            }
        }
        /* _arrange: by group; within a group who was there before, then newcomers, in the old order */
        b = 0;
        for (n : SERVING .. OFFLINE) {
            for (q : 0 .. 2) {
                p = ORD(q, cur);
                if
                :: next_[p] == n && was[p] == n -> line[b] = p; b++
                :: else
                fi
            }
            for (q : 0 .. 2) {
                p = ORD(q, cur);
                if
                :: next_[p] == n && was[p] != n -> line[b] = p; b++
                :: else
                fi
            }
        }
        for (p : 0 .. 2) {
            changed_ = changed_ || next_[p] != was[p] || line[p] != ORD(p, cur)
        }
        if
        :: changed_ ->
            assert(cur < KMAX);
            cur++;
            for (p : 0 .. 2) {
                ST(p, cur) = next_[p]; ORD(p, cur) = line[p]
            }
        :: else
        fi
    :: else -> break
    od;
    for (p : 0 .. 2) {
        was[p] = 0; next_[p] = 0; line[p] = 0
    }
    serving_ = 0; had = 0; returning_ = 0; free_ = 0; b = 0; n = 0; p = 0; q = 0;
    never_lost();
    trim()
}

/* ---------------------------------------------------------------- processes */

/* replica.settled. A leftover counts as in work: FinishLeftovers has started it before the recovery
   task runs (hosted.open), or at least before it can hold the chunk (replica.settle). */
#ifdef MUT_NOT_SETTLED
#define SETTLED(i) 1
#else
#define SETTLED(i) (op[i].ph == IDLE && pver[i] == 0)
#endif
#ifdef BUG_SUCCESSOR_UNSETTLED
#define SETTLED_THERE(s) 1
#define CLEAN_THERE(s) 1
#else                      /* service.sync: nothing of before is in work or pending there */
#define SETTLED_THERE(s) (op[s].ph == IDLE)
#define CLEAN_THERE(s) (pver[s] == 0)
#endif
#ifdef MUT_UPTODATE_ANY_VERSION
#define UPTODATE(i) (completed[i] != 0)
#else
#define UPTODATE(i) (completed[i] == rv[i] && rv[i] == cur)
#endif

#ifdef MUT_NO_LEFTOVERS
#define LEFT(i) 0
#else
#define LEFT(i) (op[i].ph == IDLE && pver[i] && SERVES(i, rv[i]))
#endif

inline crash(i) {
    crashes--;
    up[i] = 0; lease[i] = 0; needs[i] = 0; completed[i] = 0; cut[i] = 0;
    sess[i] = 0; sver[i] = 0; lver[i] = 0; lval[i] = 0; lpend[i] = 0;
    cancel(i);
    for (n : 0 .. 5) {                              /* what it sent before stays on its way */
        if
        :: net[n].kind && net[n].from == i -> net[n].old = 1
        :: else
        fi
    }
    n = 0;
    /* what it had received, or was to receive, is lost with its connections */
    if
    :: AT(i, 0).kind && AT(i, 0).live -> ans[AT(i, 0).from] = FAILED
    :: else
    fi;
    if
    :: AT(i, 1).kind && AT(i, 1).live -> ans[AT(i, 1).from] = FAILED
    :: else
    fi;
    if
    :: op[i].live -> ans[op[i].from] = FAILED
    :: else
    fi;
    drop(i, 0); drop(i, 1);
    clear_op(i);
    exposed[i] = (pver[i] != 0);                    /* a leftover may have been committed elsewhere */
    for (n : 0 .. 2) {
        if
        :: creq[n].id && creq[n].to == i -> creq[n].id = 0; creq[n].to = 0; creq[n].cv = 0
        :: else
        fi
    }
    for (n : 0 .. 1) {
        if
        :: wst[n] == 1 && wto[n] == i -> wst[n] = 0; wto[n] = NONE
        :: else
        fi
    }
    n = 0; rv[i] = 0; trim()
}

inline restart(i) {
    up[i] = 1; rv[i] = cur;                         /* StorageServer.start: routing first */
#ifdef MUT_FORGET_SEQUENCE
    forgot[i] = 1;
#endif
    trim()
}

#define CLIENT_READY(i, c) (creq[c].id && creq[c].to == i && ADMITS(i, creq[c].cv) && \
    HEAD(rv[i]) == i && op[i].ph == IDLE && pver[i] == 0)
#define CLIENT_TWIN(i, c) (creq[c].id && creq[c].to == i && ADMITS(i, creq[c].cv) && \
    HEAD(rv[i]) == i && op[i].ph != IDLE && op[i].id == creq[c].id)
#define CLIENT_REFUSED(i, c) (creq[c].id && creq[c].to == i && (TOO_OLD(i, creq[c].cv) || \
    (ADMITS(i, creq[c].cv) && HEAD(rv[i]) != i)))
#define WAITED_FOR(i, c) (wst[WRITER(creq[c].id)] == 1 && wid[WRITER(creq[c].id)] == creq[c].id && \
    wto[WRITER(creq[c].id)] == i)

inline drop_creq(c_) { creq[c_].id = 0; creq[c_].to = 0; creq[c_].cv = 0 }

inline refuse_client(i, c) {
    b = WRITER(creq[c].id);
    if
    :: WAITED_FOR(i, c) -> wst[b] = 0; wto[b] = NONE; wcv[b] = rv[i]
    :: else
    fi;
    b = 0; drop_creq(c); trim()
}

#define S(i) SYNC_SUCC(i, rv[i])
inline list_successor(i) {
    b = S(i);
    lver[i] = cver[b]; lval[i] = cval[b]; lpend[i] = (pver[b] != 0); b = 0; sess[i] = 2
}

/* Choose what happens next at replica i (`act`, with a slot or a version `x`), then let it happen. */
proctype Replica(byte i) {
    byte act, x;
end:
    do
    :: atomic {
        if
        /* messages from the predecessor, in any order */
        :: up[i] && HOP_READY(i, 0) -> act = 1
        :: up[i] && HOP_READY(i, 1) -> act = 1; x = 1
        :: up[i] && HOP_TWIN(i, 0) -> act = 2
        :: up[i] && HOP_TWIN(i, 1) -> act = 2; x = 1
        :: up[i] && HOP_REFUSED(i, 0) -> act = 3
        :: up[i] && HOP_REFUSED(i, 1) -> act = 3; x = 1
        /* requests of clients */
        :: up[i] && CLIENT_READY(i, 0) -> act = 4
        :: up[i] && CLIENT_READY(i, 1) -> act = 4; x = 1
        :: up[i] && CLIENT_READY(i, 2) -> act = 4; x = 2
        :: up[i] && CLIENT_TWIN(i, 0) -> act = 5
        :: up[i] && CLIENT_TWIN(i, 1) -> act = 5; x = 1
        :: up[i] && CLIENT_TWIN(i, 2) -> act = 5; x = 2
        :: up[i] && CLIENT_REFUSED(i, 0) -> act = 6
        :: up[i] && CLIENT_REFUSED(i, 1) -> act = 6; x = 1
        :: up[i] && CLIENT_REFUSED(i, 2) -> act = 6; x = 2
        /* the store has done its work */
        :: up[i] && op[i].ph == PREPARE -> act = 7
        /* the successor's answer */
        :: up[i] && ans[i] && op[i].ph == FORWARD -> act = 8; x = ans[i]
        /* RetryDue; a try that would only be refused again is left out */
        :: up[i] && op[i].ph == PAUSE && SUCC(i, rv[i]) != NONE && up[SUCC(i, rv[i])] &&
           rv[SUCC(i, rv[i])] <= rv[i] -> act = 9
        /* TIMEOUT or DISCONNECTED: the request is late, or lost, or its answer is */
        :: up[i] && op[i].ph == FORWARD && ans[i] == 0 && timeouts -> act = 10
        /* FinishLeftovers, and what a waiting read asks for */
        :: up[i] && LEFT(i) && (HEAD(rv[i]) == i || TAIL(rv[i]) == i) -> act = 11
        /* routing: the next snapshot, or the newest one */
        :: up[i] && !cut[i] && rv[i] < cur -> act = 12; x = rv[i] + 1
        :: up[i] && !cut[i] && rv[i] + 1 < cur -> act = 12; x = cur
        /* recovery of the successor: filling.Recovery */
        :: up[i] && SETTLED(i) && op[i].ph != HELD && SERVES(i, rv[i]) && S(i) != NONE && up[S(i)] &&
           rv[S(i)] == rv[i] && (sess[i] == 0 || sver[i] != rv[i] ||
           (sess[i] == 5 && completed[S(i)] != rv[i])) -> act = 13
        :: up[i] && sess[i] == 1 && sver[i] == rv[i] && up[S(i)] -> act = 14
        :: up[i] && sess[i] == 2 && sver[i] == rv[i] -> act = 15
        :: up[i] && sess[i] == 3 && sver[i] == rv[i] && op[i].ph == IDLE && pver[i] == 0 -> act = 16
        :: up[i] && op[i].ph == HELD && ans[i] -> act = 17
        :: up[i] && op[i].ph == HELD && !ans[i] && timeouts -> act = 18
        :: up[i] && sess[i] == 4 && sver[i] == rv[i] && up[S(i)] && rv[S(i)] == sver[i] &&
           SETTLED_THERE(S(i)) -> act = 19
        /* faults */
        :: crashes && up[i] && i < REPLICAS -> act = 20
        :: !up[i] && i < REPLICAS -> act = 21
        :: cuts && up[i] && !cut[i] -> act = 22
        :: cut[i] && lease[i] -> act = 23
        :: cut[i] -> act = 24
        fi;
        d_step {
            todo = 0;
            if
            :: act == 1 -> overtake(i, x); begin_hop(i, x); drop(i, x)
            :: act == 2 -> join(i, x)
            :: act == 3 -> refuse(i, x)
            :: act == 4 -> n = creq[x].id; drop_creq(x); begin_client(i, n); n = 0
            :: act == 5 -> op[i].client = op[i].client || WAITED_FOR(i, x); drop_creq(x)
            :: act == 6 -> refuse_client(i, x)
            :: act == 7 -> prepared(i)
            :: act == 8 && (LOST_PLACE(i) || (x != OK && SUCC(i, rv[i]) == NONE)) ->
                ans[i] = 0; todo = MOVE
            :: act == 8 && x == OK && !LOST_PLACE(i) -> ans[i] = 0; todo = COMMIT
            :: act == 8 && x == GAP && !LOST_PLACE(i) && SUCC(i, rv[i]) != NONE ->
                ans[i] = 0; op[i].whole = 1; todo = MOVE
            :: act == 8 && x == FAILED && !LOST_PLACE(i) && SUCC(i, rv[i]) != NONE ->
                ans[i] = 0; op[i].ph = PAUSE; op[i].to = NONE
            :: act == 9 -> todo = MOVE
            :: act == 10 -> timeouts--; cancel(i); op[i].ph = PAUSE; op[i].to = NONE
            :: act == 11 ->
                op[i].kind = LEFTOVER; op[i].whole = 1; op[i].serving = 1; exposed[i] = 1;
                todo = MOVE
            :: act == 12 -> adopt(i, x)
            :: act == 13 -> sess[i] = 1; sver[i] = rv[i]
            :: act == 14 -> list_successor(i)
            :: act == 15 ->
                sess[i] = ((lver[i] == cver[i] && lval[i] == cval[i] && !lpend[i]) -> 4 : 3);
                lver[i] = 0; lval[i] = 0; lpend[i] = 0
            :: act == 16 ->
                op[i].ph = HELD; op[i].to = S(i); send(i, REPLACE, cver[i], cval[i], 0)
            :: act == 17 -> sess[i] = (ans[i] == OK -> 4 : 0); ans[i] = 0; clear_op(i)
            :: act == 18 -> timeouts--; cancel(i); clear_op(i); sess[i] = 0
            :: act == 19 && CLEAN_THERE(S(i)) -> completed[S(i)] = sver[i]; sess[i] = 5
            :: act == 19 && !CLEAN_THERE(S(i)) -> sess[i] = 0       /* refused: compare again */
            :: act == 20 -> crash(i)
            :: act == 21 -> restart(i)
            :: act == 22 -> cuts--; cut[i] = 1
            :: act == 23 -> lease[i] = 0
            :: act == 24 -> cut[i] = 0
            fi;
            if
            :: todo == MOVE -> move_on(i)
            :: else
            fi;
            if
            :: todo == COMMIT -> do_commit(i); todo = FINISH
            :: else
            fi;
            if
            :: todo == FINISH -> finish_ok(i)
            :: todo == LOSE -> finish_failed(i)
            :: else
            fi;
            todo = 0; act = 0; x = 0
        } }
    od
}

#define FREE_SLOT (creq[0].id == 0 || creq[1].id == 0 || creq[2].id == 0)
inline ask(w, k) {
    b = (creq[0].id == 0 -> 0 : (creq[1].id == 0 -> 1 : 2));
    creq[b].id = wid[w]; creq[b].to = HEAD(k); creq[b].cv = k;
    wst[w] = 1; wto[w] = HEAD(k); wcv[w] = k; b = 0; trim()
}

inline unwait(w) {
    for (a : 0 .. 2) {
        if
        :: op[a].client && op[a].id == wid[w] -> op[a].client = 0
        :: else
        fi
    }
    a = 0; wto[w] = NONE
}

proctype Writer(byte w) {
    byte k;
end:
    do
    /* send, by the routing that it happens to know */
    :: d_step { wst[w] == 0 && FREE_SLOT && wcv[w] == cur && HEAD(cur) != NONE -> k = cur; ask(w, k); k = 0 }
    :: d_step { wst[w] == 0 && FREE_SLOT && wcv[w] < cur && HEAD(cur) != NONE -> k = cur; ask(w, k); k = 0 }
    :: d_step { wst[w] == 0 && FREE_SLOT && wcv[w] < cur && HEAD(wcv[w]) != NONE -> k = wcv[w]; ask(w, k); k = 0 }
    :: d_step { wst[w] == 0 && FREE_SLOT && wcv[w] + 1 < cur && HEAD(wcv[w] + 1) != NONE ->
        k = wcv[w] + 1; ask(w, k); k = 0 }
    /* no answer in time: again with the same sequence; the former try may arrive later */
    :: d_step { wst[w] == 1 && timeouts -> timeouts--; unwait(w); wst[w] = 0 }
    /* the asked server is known to be gone from the chain (NodeCalls.still_good) */
    :: d_step { wst[w] == 1 && wcv[w] < cur && HEAD(cur) != NONE && HEAD(cur) != wto[w] ->
        unwait(w); wst[w] = 0; wcv[w] = cur; trim() }
    /* the deadline: outcome unknown, the next write uses the same channel */
    :: d_step { wst[w] == 1 && giveups ->
        giveups--; unwait(w);
        if
        :: wid[w] == LAST_OF(w) -> wst[w] = 2; wcv[w] = 0
        :: else -> wst[w] = 0; wid[w] = wid[w] + 1
        fi }
    od
}

#ifdef MUT_SERVE_AFTER_LEASE
#define READABLE(i) (up[i] && SERVES(i, rv[i]))
#else
#define READABLE(i) (up[i] && SERVES(i, rv[i]) && LEASE_OK(i))
#endif

/* plan_read */
#ifdef MUT_COMMIT_FIRST
#define PLAN_COMMITTED(i) 1
#define PLAN_ASK(i) 0
#elif defined(MUT_SKIP_TAIL_QUERY)
#define PLAN_COMMITTED(i) (TAIL(rv[i]) != (i) || pver[i] == 0 || !exposed[i])
#define PLAN_ASK(i) 0
#elif defined(MUT_TAIL_DOES_NOT_WAIT)
#define PLAN_COMMITTED(i) (pver[i] == 0 || TAIL(rv[i]) == (i))
#define PLAN_ASK(i) (pver[i] != 0 && TAIL(rv[i]) != (i))
#else
#define PLAN_COMMITTED(i) (pver[i] == 0 || (TAIL(rv[i]) == (i) && !exposed[i]))
#define PLAN_ASK(i) (pver[i] != 0 && TAIL(rv[i]) != (i))
#endif

inline end_read() { rd = 0; rdat = 0; rdk = 0; rdtail = 0; rdlo = 0; rdmask = 0 }

#define T(i) TAIL(rv[i])
#define TAILED(i) (T(i) != NONE && READABLE(T(i)) && rv[T(i)] == rv[i] && PLAN_COMMITTED(T(i)))
inline ask_tail(i_) {
    rd = 1; rdat = i_; rdk = rv[i_]; rdtail = cver[T(i_)]; rdlo = gver; rdmask = gack
}

/* All readers. A read at a replica without dispute begins and ends at once: every real one has more freedom. */
#define NEWS(i) (cver[i] != gver || cval[i] != gval)
proctype Readers() {
    byte i;
end:
    do
    /* every replica at any time; one that would change nothing is left out */
    :: d_step { READABLE(0) && PLAN_COMMITTED(0) && NEWS(0) -> observe(cver[0], cval[0], gver, gack) }
    :: d_step { READABLE(1) && PLAN_COMMITTED(1) && NEWS(1) -> observe(cver[1], cval[1], gver, gack) }
    :: d_step { READABLE(2) && PLAN_COMMITTED(2) && NEWS(2) -> observe(cver[2], cval[2], gver, gack) }
    /* the tail answers a question that replica i has asked at chain version rdk */
    :: d_step { !rd && READABLE(0) && PLAN_ASK(0) && TAILED(0) -> ask_tail(0) }
    :: d_step { !rd && READABLE(1) && PLAN_ASK(1) && TAILED(1) -> ask_tail(1) }
    :: d_step { !rd && READABLE(2) && PLAN_ASK(2) && TAILED(2) -> ask_tail(2) }
    /* settle_read */
    :: d_step { rd && READABLE(rdat) && rv[rdat] == rdk ->
        i = rdat;
        if
        :: pver[i] && pver[i] != cver[i] && pver[i] == rdtail -> observe(pver[i], pval[i], rdlo, rdmask)
        :: pver[i] && pver[i] != cver[i] && pver[i] != rdtail && cver[i] == rdtail ->
            observe(cver[i], cval[i], rdlo, rdmask)
        :: else                                     /* AGAIN */
        fi;
        i = 0; end_read() }
    :: d_step { rd && (!up[rdat] || rv[rdat] != rdk) -> end_read() }
    od
}
/* The lease: mgmtd buries a node a full lease after its last heartbeat, the node fences itself after half of it. */
#ifdef NO_BURY                                     /* fewer runs, for a quick look */
#define DEAD(i) 0
#elif defined(MUT_BURY_EARLY)
#define DEAD(i) (i < REPLICAS && alive[i] && (!lease[i] || cut[i]))
#else
#define DEAD(i) (i < REPLICAS && alive[i] && !lease[i])
#endif

#define ENTERS(i) (up[i] && !cut[i] && (!lease[i] || !alive[i]))
#define TELLS(i) (up[i] && !cut[i] && lease[i] && alive[i] && ST(i, cur) == SYNCING && UPTODATE(i))

/* membership.Membership */
#ifdef MUT_NO_NEEDS_VERSION
#define GRANT(i) skip
#else
#define GRANT(i) needs[i] = cur
#endif

proctype Mgmtd() {
    byte who = NONE, fresh = NONE;
end:
    do
    :: atomic {
        if
        /* Registered, or HeartbeatArrived after the lease had run out */
        :: ENTERS(0) -> who = 0
        :: ENTERS(1) -> who = 1
        :: ENTERS(2) -> who = 2
        /* a heartbeat that says UPTODATE */
        :: TELLS(0) -> fresh = 0
        :: TELLS(1) -> fresh = 1
        :: TELLS(2) -> fresh = 2
        /* _tick buries one, or all who are due */
        :: DEAD(0) -> alive[0] = 0
        :: DEAD(1) -> alive[1] = 0
        :: DEAD(2) -> alive[2] = 0
        :: DEAD(0) + DEAD(1) + DEAD(2) >= 2 ->
            d_step {
                a = 0;
                do
                :: a < 3 ->
                    if
                    :: DEAD(a) -> alive[a] = 0
                    :: else
                    fi;
                    a++
                :: else -> break
                od;
                a = 0 }
        fi;
        d_step {
            if
            :: who != NONE -> alive[who] = 1
            :: else
            fi;
            evaluate(fresh);
            if
            :: who != NONE ->                       /* Answer: the lease and the routing version */
                lease[who] = 1; GRANT(who)
            :: else
            fi;
            who = NONE; fresh = NONE
        } }
    od
}

proctype World() {
end:
    do
    /* (3), liveness: nothing more can happen. All is done, everybody serves, all are equal. */
    :: timeout && !good -> d_step {
        assert(wst[0] == 2 && (WRITERS == 1 || wst[1] == 2));
        assert(ST(0, cur) == SERVING && ST(1, cur) == SERVING && (REPLICAS == 2 || ST(2, cur) == SERVING));
        assert(cver[0] == cver[1] && cval[0] == cval[1] && pver[0] == 0 && pver[1] == 0);
        assert(REPLICAS == 2 || (cver[0] == cver[2] && cval[0] == cval[2] && pver[2] == 0));
        assert((cval[0] & gack) == gack && (cval[0] & 7) == (GIVEUPS == 0 -> (1 << WRITES) - 1 : (cval[0] & 7)));
        good = 1 }
    od
}

#ifdef NO_READS
#define run_readers() skip
#else
#define run_readers() run Readers()
#endif
init {
    d_step {
        for (a : 0 .. 2) {
            up[a] = (a < REPLICAS); alive[a] = (a < REPLICAS); lease[a] = (a < REPLICAS);
            rv[a] = 1; cver[a] = 1; op[a].from = NONE; op[a].to = NONE;
            hist[1].ord[a] = a; hist[1].st[a] = (a < REPLICAS -> SERVING : OFFLINE)
        }
        a = 0;
        for (b : 0 .. 1) {
            wto[b] = NONE; wcv[b] = 1; wid[b] = FIRST_OF(b); wst[b] = (b < WRITERS -> 0 : 2)
        }
        b = 0
    }
    atomic {
        run Replica(0); run Replica(1); run Replica(2);
        run Mgmtd();
        run Writer(0);
        if
        :: WRITERS == 2 -> run Writer(1)
        :: else
        fi;
        run_readers(); run World()
    }
}
