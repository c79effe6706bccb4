"""Would a test fail if an equation were wrong? `python tests/mutate.py [script[:function] ...]`

Of every function of the section Equations it makes mutants, one small error each: a sign flipped, a
factor or a term dropped, min for max, a comparison changed. Each is put into the loaded script of a
forked process, where the tests that call the function are run up to the first that fails; files
stay as they are. Those that no test notices are listed, and make the exit status 1.

    python tests/mutate.py                       every script
    python tests/mutate.py ppo dqn:huber_loss    these
    python tests/mutate.py test_trust_region     what the tests of a file state, mutated likewise
    python tests/mutate.py ppo --verbose         which test noticed which error

Not part of the suite: it takes about half a second a mutant.
"""

import argparse
import ast
import copy
import inspect
import os
import signal
import sys
import time

import pytest
from conftest import ROOT, SCRIPTS, SOURCES, module
from test_rules import equation_functions

TESTS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}

SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
COMPARISONS = {  # the border moved, and the contrary
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
PAIRS = "min max, minimum maximum, argmin argmax, amin amax, mean sum"
NAMES = {a: b for pair in PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])}
DROPPED = "abs exp log sqrt pow detach clamp clip flip".split()  # x.abs() becomes x

# Mutants that compute the same, or so nearly that no test can tell: function, what became what.
EQUIVALENT = {
    # Both pieces have one value and one slope at the border.
    ("huber_loss", "x.abs() <= delta -> x.abs() < delta"),
    # It only keeps 0/0 out.
    (
        "shape_fitness",
        "fitness.std(correction=0) + 1e-08 -> fitness.std(correction=0) - 1e-08",
    ),
    # A length exactly at the border has probability 0.
    (
        "h_sigma",
        "length < (1.4 + 2 / (d + 1)) * usual -> length <= (1.4 + 2 / (d + 1)) * usual",
    ),
    # Of a span as long as the rows nothing is left to add.
    ("running_sums", "span < len(sums) -> span <= len(sums)"),
    # A weight of 0 is 0 either way.
    ("update_covariance", "weights >= 0 -> weights > 0"),
}


def variants(node):
    """What may stand wrongly in the place of an expression or of a return."""
    if isinstance(node, ast.BinOp):
        left, op, right = node.left, type(node.op), node.right
        if op in SWAPS:
            yield ast.BinOp(left, SWAPS[op](), right)
            yield left
        if op in (ast.Add, ast.Mult):
            yield right
        if op is ast.Sub:
            yield ast.UnaryOp(ast.USub(), right)
        if op is ast.Div and not isinstance(left, ast.Constant):
            yield ast.BinOp(ast.Constant(1.0), ast.Div(), right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        if not isinstance(node.operand, ast.Constant):  # -1 is an axis
            yield node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for op in COMPARISONS.get(type(node.ops[0]), ()):
            yield ast.Compare(node.left, [op()], node.comparators)
    elif isinstance(node, ast.Return):
        if isinstance(node.value, ast.Tuple):
            first, *others = node.value.elts
            yield ast.Return(ast.Tuple([ast.UnaryOp(ast.USub(), first), *others], ast.Load()))
        else:
            yield ast.Return(ast.UnaryOp(ast.USub(), node.value))
    elif isinstance(node, ast.Call):
        keywords = [ast.keyword(NAMES.get(k.arg, k.arg), k.value) for k in node.keywords]
        if any(k.arg in ("min", "max") for k in node.keywords):
            yield ast.Call(node.func, node.args, keywords)
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield ast.Call(ast.Name(NAMES[node.func.id], ast.Load()), node.args, node.keywords)
        if isinstance(node.func, ast.Attribute):
            value, name = node.func.value, node.func.attr
            if name in NAMES:
                func = ast.Attribute(value, NAMES[name], ast.Load())
                yield ast.Call(func, node.args, node.keywords)
            if name in DROPPED and not (isinstance(value, ast.Name) and value.id == "torch"):
                yield value


class Put(ast.NodeTransformer):
    """Put one node into the place of another."""

    def __init__(self, place, new):
        self.place, self.new = place, new

    def visit(self, node):
        return self.new if node is self.place else self.generic_visit(node)


def mutants(function):
    """(what became what, the function with it) of every small error."""
    body = [node for statement in function.body for node in ast.walk(statement)]
    for number, node in enumerate(body):
        for choice, new in enumerate(variants(node)):
            wrong = copy.deepcopy(function)
            place = [n for statement in wrong.body for n in ast.walk(statement)][number]
            put = Put(place, list(variants(place))[choice])
            label = " -> ".join(ast.unparse(ast.fix_missing_locations(n)) for n in (node, new))
            yield label, ast.fix_missing_locations(put.visit(wrong))


def calls(definition, wanted):
    """Whether a definition mentions script.name, or a name of its own file."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in wanted and node.value.id in (*SCRIPTS, "script"):
                return True
        if isinstance(node, ast.Name) and ("own", node.id) in wanted:
            return True
    return False


def tests_of(name, scripts):
    """Node ids of the tests that call this function of these scripts, also by way of helpers."""
    found = []
    for file, source in TESTS.items():
        tree = ast.parse(source)
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        if not imported & set(scripts):
            continue
        definitions = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        wanted, size = {name}, 0
        while len(wanted) > size:
            size = len(wanted)
            wanted |= {("own", d.name) for d in definitions if calls(d, wanted)}
        tests = [d.name for d in definitions if d.name.startswith("test_")]
        found += [f"tests/{file}.py::{test}" for test in tests if ("own", test) in wanted]
    return found


def run(tests, install, timeout):
    """Run tests in a fork after install(): what failed first, if anything, and seconds by test."""
    read, write = os.pipe()
    start, child = time.monotonic(), os.fork()
    if not child:
        os.setpgrp()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

        class Reporter:
            def pytest_runtest_logreport(self, report):
                os.write(write, f"{report.failed}\t{report.duration}\t{report.nodeid}\n".encode())

        status = 1
        try:
            install()
            options = ["-x", "-q", "-p", "no:cacheprovider"]
            status = pytest.main([*options, *tests], plugins=[Reporter()])
        finally:
            os._exit(status)
    os.close(write)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - start > timeout:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            return "timeout", {}
        time.sleep(0.01)
    failed, seconds = [], dict.fromkeys(tests, 0.0)
    with os.fdopen(read) as pipe:
        for line in pipe:
            bad, duration, test = line.rstrip("\n").split("\t")
            failed += [test] * (bad == "True")
            seconds[test.partition("[")[0]] += float(duration)
    status = os.waitstatus_to_exitcode(ended[1])
    return [*failed, f"exit status {status}"][0] if status else "", seconds


def targets(name):
    """Of a script or a file of tests: functions, their trees, their modules, the tests to run."""
    name, _, only = name.partition(":")
    if name in TESTS:
        loaded = module(name)
        for node in ast.parse(TESTS[name]).body:
            wanted = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            if wanted and only in ("", node.name):
                yield node.name, node, [loaded], [f"tests/{name}.py::{node.name}"]
        return
    for function in [only] if only else equation_functions(name):
        text = inspect.getsource(getattr(module(name), function))
        same = [x for x in SCRIPTS if text in SOURCES[x]]
        node, modules = ast.parse(text).body[0], [module(x) for x in same]
        yield function, node, modules, tests_of(function, same)


def install(function, modules):
    """Put a function into the place of that of its name."""
    code = compile(ast.Module([function], []), "<mutant>", "exec")
    for loaded in modules:
        exec(code, loaded.__dict__)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=SCRIPTS, help="scripts, or files of tests")
    parser.add_argument("--verbose", action="store_true", help="which test noticed which error")
    options = parser.parse_args()
    unknown = {name.partition(":")[0] for name in options.names} - set(SCRIPTS) - set(TESTS)
    if unknown:
        parser.error(f"no script and no file of tests: {', '.join(sorted(unknown))}")
    os.chdir(ROOT)
    for file in TESTS:
        module(file)  # here, once, and not in every fork
    seen, total, survivors, unused = {}, 0, 0, set(EQUIVALENT)
    for name in options.names:
        file = name.partition(":")[0]
        for function, node, modules, tests in targets(name):
            if seen.setdefault((function, ast.unparse(node)), name) != name:
                continue  # the same text as in a script before
            if not tests:
                survivors += 1
                print(f"{file}:{function}  no test calls it")
                continue
            failed, seconds = run(tests, lambda: None, 600)
            if failed:
                raise SystemExit(f"{function}: {failed} fails without any error put in")
            noticed, missed, timeout = 0, [], 20 + 5 * sum(seconds.values())
            tests.sort(key=seconds.get)  # most errors meet a fast test
            for error, wrong in mutants(node):
                if (function, error) in EQUIVALENT:
                    unused.discard((function, error))
                    continue
                by, _ = run(tests, lambda wrong=wrong: install(wrong, modules), timeout)
                noticed += bool(by)
                if not by:
                    missed.append(error)
                if options.verbose:
                    print(f"    {error}\n        {by or 'NOT NOTICED'}", flush=True)
            total, survivors = total + noticed + len(missed), survivors + len(missed)
            print(f"{file}:{function}  {noticed} of {noticed + len(missed)} noticed", flush=True)
            for error in missed:
                print(f"    not noticed: {error}", flush=True)
    print(f"{total} errors put in, {survivors} not noticed")
    if options.names == SCRIPTS and unused:
        print("no longer arise:", *sorted(unused), sep="\n    ")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    # The parent only imports: what autograd starts in it, a fork could not use.
    main()
