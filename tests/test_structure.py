"The package as a graph: which module imports what of which, in the order of the chapters."
import ast, functools, json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERBS = 'slm.cli' # its functions are commands, named like what they call; nobody imports them

@functools.cache
def sources(root):
    "Module -> its syntax tree"
    files = [f for f in sorted((root/'slm').rglob('*.py')) if f.stem != '_modidx']
    return {'.'.join(f.relative_to(root).with_suffix('').parts).removesuffix('.__init__'): ast.parse(f.read_text()) for f in files}

def imports(tree, here, modules):
    "(module, name or None) that a module imports from the package, at the top or inside of functions"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from ((a.name, None) for a in n.names if a.name in modules)
        if not isinstance(n, ast.ImportFrom): continue
        up = here.split('.')[:-n.level] if n.level else []
        base = '.'.join([*up, *filter(None, [n.module])])
        for a in n.names:
            inner = f'{base}.{a.name}'
            if inner in modules: yield inner, None
            elif base in modules: yield base, a.name

@functools.cache
def graph(root):
    "Module -> modules that it imports"
    trees = sources(root)
    return {m: {to for to,_ in imports(t, m, trees)}-{m, 'slm'} for m,t in trees.items()}

def circles(edges):
    "Modules that import themselves by way of others"
    def reached(m, seen=()):
        for to in edges[m]:
            if to not in seen: seen = reached(to, (*seen, to))
        return seen
    return {m for m in edges if m in reached(m)}

def private(root):
    "(module, of which, name) of private names that a module takes from another one, by import or through the module's name"
    trees, found = sources(root), set()
    hidden = lambda name: name[0] == '_' and not name.startswith('__')
    for m,t in trees.items():
        found |= {(m, to, name) for to,name in imports(t, m, trees) if name and hidden(name)}
        alias = {a.asname or a.name: f'{n.module}.{a.name}' for n in ast.walk(t) if isinstance(n, ast.ImportFrom) for a in n.names}
        for n in ast.walk(t):
            if isinstance(n, ast.Attribute) and hidden(n.attr) and isinstance(n.value, ast.Name) and alias.get(n.value.id) in trees:
                found.add((m, alias[n.value.id], n.attr))
    return found

def hidden_attributes(root):
    "(module, name) of private attributes that a module takes of objects, while another module gives them"
    hidden = lambda name: name[0] == '_' and not name.startswith('__')
    def given(tree):
        for n in ast.walk(tree):
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)): yield n.name
            elif isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store): yield n.attr
            elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): yield n.id
    own = {m: set(given(t)) for m,t in sources(root).items()}; ours = set().union(*own.values())
    taken = {(m, n.attr) for m,t in sources(root).items() for n in ast.walk(t) if isinstance(n, ast.Attribute) and hidden(n.attr)}
    return {(m, name) for m,name in taken if name in ours-own[m]}

def chapters(root):
    "Module -> the notebook that exports it"
    res = {}
    for p in sorted((root/'nbs').glob('[0-9]*.ipynb')):
        code = '\n'.join(''.join(c['source']) for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'code')
        if m := re.search(r'^#\|\s*default_exp\s+(\S+)', code, re.M): res[f'slm.{m[1]}'] = p.name
    return res

def later(root):
    "(module, which one) of imports from a later chapter"
    at = chapters(root)
    return {(m, to) for m,tos in graph(root).items() for to in tos if m in at and to in at and at[to] > at[m]}

def public(root):
    "Public name -> modules that export it"
    res = {}
    for m,t in sources(root).items():
        for n in t.body:
            if m == VERBS or not isinstance(n, ast.Assign) or getattr(n.targets[0], 'id', '') != '__all__': continue
            for name in ast.literal_eval(n.value): res.setdefault(name, []).append(m)
    return res

def test_no_modules_import_each_other():
    assert circles(graph(ROOT)) == set()

def test_private_names_stay_in_their_chapter():
    assert private(ROOT) == set() and hidden_attributes(ROOT) == set()

def test_no_module_imports_from_a_later_chapter():
    "Not even inside of a function: what a chapter uses has been read before"
    assert later(ROOT) == set()

def test_a_public_name_means_one_thing():
    "Whoever imports everything of two modules gets what either of them says"
    assert {n: tuple(ms) for n,ms in public(ROOT).items() if len(ms) > 1} == {}

def test_statistics_need_no_torch():
    assert graph(ROOT)['slm.eval.stats'] == {'slm.core'}

def test_evaluation_takes_nothing_of_serving():
    assert [(m, to) for m,tos in graph(ROOT).items() if m.startswith('slm.eval.') for to in tos if to.startswith('slm.serve.')] == []

def test_faults_of_structure_are_found(tmp_path):
    files = dict(a="__all__ = ['x']\nfrom .b import *\ndef x(): from slm.c import _y; return _y",
                 b="def f(): from slm import a; return a._z", c="__all__ = ['x']\n_y = x = 1\ndef g(o): return o._r",
                 d="class R: _r = 1", cli="__all__ = ['x']")
    for d in ('slm', 'nbs'): (tmp_path/d).mkdir()
    (tmp_path/'slm'/'__init__.py').write_text('')
    for i,(k,s) in enumerate(files.items()):
        (tmp_path/'slm'/f'{k}.py').write_text(s)
        cell = dict(cell_type='code', source=[f'#| default_exp {k}'])
        (tmp_path/'nbs'/f'{i:02}_{k}.ipynb').write_text(json.dumps(dict(cells=[cell])))
    assert circles(graph(tmp_path)) == {'slm.a', 'slm.b'}
    assert private(tmp_path) == {('slm.a', 'slm.c', '_y'), ('slm.b', 'slm.a', '_z')}
    assert hidden_attributes(tmp_path) == {('slm.c', '_r')}
    assert later(tmp_path) == {('slm.a', 'slm.b'), ('slm.a', 'slm.c')}
    assert [n for n,ms in public(tmp_path).items() if len(ms) > 1] == ['x'] and public(tmp_path)['x'] == ['slm.a', 'slm.c']
