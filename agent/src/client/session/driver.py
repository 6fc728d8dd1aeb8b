"""Runs pieces of code that a host sends, one after the other, in one namespace.

Requests come on descriptor 0, each up to a NUL: "c" and code, or "s" and fresh random bytes in hexadecimal. Answers go to
descriptor 3: a line of kind, length and number of bytes cut off, then text of that length. Programs that the code starts have
neither descriptor.
"""


def _hearth():
    import ast
    import linecache
    import os
    import signal
    import sys
    import traceback
    import types

    MOST = 1 << 20  # bytes of text in an answer
    TOP_LEVEL_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    COROUTINE = 0x80
    read, write, dup2, getpid = os.read, os.write, os.dup2, os.getpid

    requests, results = os.dup(0), os.dup(3)
    outputs = [(fd, os.dup(fd)) for fd in (1, 2)]
    os.close(3)
    nothing = os.open(os.devnull, os.O_RDONLY)
    dup2(nothing, 0)
    os.close(nothing)

    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    hooks = []
    hearth = types.ModuleType("hearth", "What a session offers to its code.")
    hearth.on_clone = hooks.append  # called in each clone, before code runs there
    sys.modules["hearth"] = hearth

    running = False
    loop = None

    def interrupted(_number, _frame):
        # Late ones, for code that has ended, do not matter.
        if running:
            raise KeyboardInterrupt

    def request(pending=bytearray()):
        searched = 0
        while True:
            end = pending.find(0, searched)
            if end >= 0:
                message = bytes(pending[:end])
                del pending[: end + 1]
                return message[:1], message[1:]
            searched = len(pending)
            chunk = read(requests, 65536)
            if not chunk:
                os._exit(0)
            pending.extend(chunk)

    def answer(kind, text=""):
        body = text.encode("utf-8", "backslashreplace")
        kept = body[:MOST]
        rest = b"%s %d %d\n" % (kind, len(kept), len(body) - len(kept)) + kept
        while rest:
            rest = rest[write(results, rest) :]

    def stream(fd):
        return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)

    def restore():
        """What earlier code closed is there again."""
        for fd, kept in outputs:
            dup2(kept, fd)
        if getattr(sys.stdout, "closed", True):
            sys.stdout = sys.__stdout__ = stream(1)
        if getattr(sys.stderr, "closed", True):
            sys.stderr = sys.__stderr__ = stream(2)
        if signal.getsignal(signal.SIGINT) is not interrupted:
            signal.signal(signal.SIGINT, interrupted)

    def evaluate(code):
        nonlocal loop
        value = eval(code, main.__dict__)
        if code.co_flags & COROUTINE:
            if loop is None:
                import asyncio

                loop = asyncio.new_event_loop()
                asyncio.set_event_loop(loop)
            task = loop.create_task(value)
            try:
                value = loop.run_until_complete(task)
            except BaseException:
                task.cancel()
                raise
        return value

    def call(text, name):
        nonlocal running
        try:
            running = True
            linecache.cache[name] = (len(text), None, text.splitlines(True), name)
            tree = compile(text, name, "exec", ast.PyCF_ONLY_AST | TOP_LEVEL_AWAIT)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            value = None
            if tree.body:
                evaluate(compile(tree, name, "exec", TOP_LEVEL_AWAIT))
            if last is not None:
                value = evaluate(compile(ast.Expression(last.value), name, "eval", TOP_LEVEL_AWAIT))
            if value is None:
                return b"n", ""
            main.__dict__["_"] = value
            return b"v", repr(value)
        except BaseException as error:
            running = False
            return b"e", described(error)
        finally:
            running = False

    def described(error):
        """A traceback without the frames of this program."""
        report = traceback.TracebackException.from_exception(error)
        frames = [frame for frame in report.stack if frame.filename != here]
        report.stack = traceback.StackSummary.from_list(frames)
        return "".join(report.format())

    def flush():
        for output in (sys.stdout, sys.stderr):
            try:
                output.flush()
            except Exception:
                pass

    def reseed(seed):
        """Makes generators that were seeded before the capture strangers to those of other clones."""
        modules = sys.modules
        if "random" in modules:
            modules["random"].seed(seed)
        if "numpy.random" in modules:
            words = [int.from_bytes(seed[at : at + 4], "little") for at in range(0, len(seed), 4)]
            modules["numpy.random"].seed(words)
        if "tempfile" in modules:
            modules["tempfile"]._name_sequence = None
        if "uuid" in modules:
            modules["uuid"]._node = modules["uuid"]._last_timestamp = None
        if "ssl" in modules:
            modules["ssl"].RAND_add(seed, float(len(seed)))
        for hook in hooks:
            hook()

    here = call.__code__.co_filename
    me = getpid()
    sys.stdout = sys.__stdout__ = stream(1)
    sys.stderr = sys.__stderr__ = stream(2)
    signal.signal(signal.SIGINT, interrupted)
    answer(b"n")
    number = 0
    while True:
        kind, body = request()
        if kind == b"s":
            try:
                reseed(bytes.fromhex(body.decode()))
                answer(b"n")
            except BaseException as error:
                answer(b"e", described(error))
            continue
        number += 1
        restore()
        kind, text = call(body.decode(), "<call %d>" % number)
        flush()
        if getpid() != me:
            os._exit(kind == b"e")  # forked by the code
        answer(kind, text)


_hearth()
