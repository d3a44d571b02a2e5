"The book as a book: configuration, sidebar, links, symbols, bibliography, README, and what every chapter keeps to."
import ast, copy, functools, json, re, statistics, subprocess, sys
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import docs

CHAPTERS = sorted(p for p in docs.NBS.glob('*.ipynb') if p.name[0] not in '._')
chapter = pytest.mark.parametrize('nb', CHAPTERS, ids=lambda p: p.stem)
FLAG = re.compile(r'^#\|\s*(exports?|exporti)\b', re.M)

def code(nb): return [c for c in docs.cells(nb) if c['cell_type'] == 'code']
def prose(nb): return [docs.src(c) for c in docs.cells(nb) if c['cell_type'] == 'markdown']

# ---- configuration

def test_quarto_config_follows_the_schema():
    assert docs.schema_faults() == []

@pytest.mark.parametrize('where,old,new', [
    ('website', 'page-navigation', 'page-navigatoin'), ('website', 'back-to-top-navigation', 'back-to-top'), ('project', 'type', 'tpye'),
    ('html', 'code-copy', 'code-cpy'), ('html', 'toc-depth', 'toc-dept'), ('top', 'bibliography', 'bibliografy'),
    ('sidebar', 'style', 'stile')])
def test_a_misspelt_key_is_caught(where, old, new):
    conf = copy.deepcopy(docs.config())
    d = dict(top=conf, website=conf['website'], project=conf['project'], html=conf['format']['html'],
             sidebar=conf['website']['sidebar'])[where]
    d[new] = d.pop(old)
    assert docs.schema_faults(conf)

@pytest.mark.parametrize('where,key,val',
                         [('website', 'page-navigation', 'perhaps'), ('html', 'toc-depth', 'three'), ('html', 'code-overflow', 'cut')])
def test_a_wrong_value_is_caught(where, key, val):
    conf = copy.deepcopy(docs.config()); {'website': conf['website'], 'html': conf['format']['html']}[where][key] = val
    assert any(str(val) in f or 'should be' in f or 'invalid' in f for f in docs.schema_faults(conf))

def test_top_level_config_is_the_book_s():
    assert (ROOT/'_quarto.yml').resolve() == (docs.NBS/'_quarto.yml').resolve()
    assert (ROOT/'references.bib').read_text() == (docs.NBS/'references.bib').read_text()

def test_sidebar_lists_every_chapter_once_in_order():
    assert docs.sidebar_faults() == []

def test_sidebar_faults_are_found(monkeypatch):
    listed = docs.sidebar()
    monkeypatch.setattr(docs, 'sidebar', lambda: [listed[1], listed[0], *listed[3:], listed[0], '99_ghost.ipynb'])
    bad = '\n'.join(docs.sidebar_faults())
    assert f'lacks {listed[2]}' in bad and '99_ghost.ipynb, which is not' in bad and f'{listed[0]} twice' in bad

def test_workflows_follow_github_s_schema():
    files = sorted((ROOT/'.github'/'workflows').glob('*.yml')); assert len(files) >= 3
    r = subprocess.run([docs.tool('check-jsonschema'), '--builtin-schema', 'vendor.github-workflows', *map(str, files)],
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stdout+r.stderr

# ---- bibliography

def test_every_cited_paper_is_in_the_bibliography():
    assert docs.bibliography_faults() == []

def test_bibliography_is_complete_and_used():
    refs, text = docs.bibliography(), '\n'.join(s for nb in CHAPTERS for s in map(docs.src, docs.cells(nb)))
    assert len({e['key'] for e in refs}) == len({docs.norm(e['url']) for e in refs}) == len(refs)
    cited = docs.cited()
    for e in refs:
        assert e.keys() >= {'author', 'title', 'year', 'url'}, e['key']
        assert re.fullmatch(r'\d{4}', e['year']), e['key']
        assert docs.norm(e['url']) in cited or e['url'].rstrip('/') in text, f"no chapter cites {e['key']}"

@pytest.mark.parametrize('url',
                         ['http://arxiv.org/pdf/1706.03762v7.pdf', 'https://arxiv.org/abs/1706.03762', 'https://arxiv.org/abs/1706.03762.'])
def test_one_paper_has_one_spelling(url):
    assert docs.norm(url) == 'https://arxiv.org/abs/1706.03762'

# ---- README

def test_readme_is_what_index_says():
    assert docs.in_step(), 'README.md is not in step with nbs/index.ipynb: make prepare'

def test_readme_of_a_small_notebook(tmp_path, monkeypatch):
    out = lambda **d: [dict(output_type='display_data', data=d, metadata={})]
    md = lambda s: dict(cell_type='markdown', source=s)
    py = lambda s, outputs=(): dict(cell_type='code', source=s, outputs=list(outputs))
    nb = dict(cells=[
        md('# A title\n\n> What it is.'),
        md('See [core](00_core.ipynb#seeds), [home](https://example.org), [rules](../CONTRIBUTING.md), '
           '[law](https://github.com/slm-book/slm/blob/main/LICENSE).'), md('## Export -'),
        py('#| hide\nsecret = 1'), py('#| echo: false\nquiet()', out(**{'text/markdown': ['[x](11_model.gpt.ipynb)']})),
        py('6*7', out(**{'text/plain': '42'})), py('plot()', out(**{'text/plain': '<Figure>', 'image/png': 'AAAA'})),
        py('%%bash\nmake demo')])
    (tmp_path/'index.ipynb').write_text(json.dumps(nb)); monkeypatch.setattr(docs, 'NBS', tmp_path)
    text = docs.readme()
    assert text.startswith('# A title\n\nWhat it is.\n')
    assert 'secret' not in text and 'quiet' not in text and 'Figure' not in text and 'Export' not in text
    assert '[core](nbs/00_core.ipynb#seeds)' in text
    assert '(https://example.org)' in text and '(CONTRIBUTING.md)' in text and '(LICENSE)' in text and '(nbs/11_model.gpt.ipynb)' in text
    assert '``` python\n6*7\n```\n\n    42\n' in text and '``` sh\nmake demo\n```' in text

def test_readme_names_the_two_commands_and_where_its_links_lead():
    text = (ROOT/'README.md').read_text()
    assert 'make demo' in text and 'make test' in text and 'git clone' in text
    for url in re.findall(r'\]\((?!https?:|#|mailto:)([^)#\s]+)', text): assert (ROOT/url).exists(), url

# ---- links and symbols

@chapter
def test_links_between_chapters_lead_somewhere(nb):
    for s in prose(nb):
        for url in re.findall(r'\]\((?!https?:|#|mailto:)([^)#\s]+)', s): assert (docs.NBS/url).exists(), f'{nb.name}: {url}'

@chapter
def test_every_exported_name_has_a_page(nb):
    "nbdev's lookup knows each public name of the chapter, and the page it links to is this chapter's"
    from nbdev.doclinks import NbdevLookup
    m = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(map(docs.src, code(nb))), re.M)
    if not m: pytest.skip('exports nothing')
    path = ROOT/'slm'/f"{m[1].replace('.', '/')}.py"
    defs = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
            and n.name[0] != '_' and not any('patch' in ast.unparse(d) for d in n.decorator_list)]
    look = NbdevLookup()
    for n in defs:
        link = look.doc(f'slm.{m[1]}.{n}')
        assert link and re.search(rf'/{re.escape(re.sub(r"^[0-9]+[a-z]?_", "", nb.stem))}\.html#',
                                  link), f'{nb.name}: `{n}` has no page (make prepare)'

@chapter
def test_full_names_in_prose_exist(nb):
    "`slm.group.name` or `slm.group.name.symbol` in backticks names something"
    from nbdev.doclinks import NbdevLookup
    look = NbdevLookup()
    for s in prose(nb):
        for n in re.findall(r'`(slm(?:\.\w+)+)(?:\(\))?`', s):
            p = ROOT/n.replace('.', '/')
            assert p.is_dir() or p.with_suffix('.py').exists() or look.doc(n), f'{nb.name}: `{n}`'

def test_dead_links_are_found(tmp_path):
    base = docs.config()['website']['site-url']
    (tmp_path/'index.html').write_text('<h2 id="top">x</h2><a href="a.html">1</a><a class="x" href="#top">2</a><a '
                                       'href="#gone">3</a><a href="https://example.org">4</a>')
    (tmp_path/'a.html').write_text(f'<a href="./index.html#top">1</a><a href="{base}/index.html#none">2</a><a href="b.html#x">3</a>')
    assert set(docs.dead_links(tmp_path)) == {'index.html: no anchor for #gone', 'a.html: no page for b.html#x',
                                              f'a.html: no anchor for {base}/index.html#none'}

# ---- every chapter

@chapter
def test_chapter_opens_and_closes_as_the_others(nb):
    first = prose(nb)[0]
    assert docs.cells(nb)[0]['cell_type'] == 'markdown' and re.match(r'# \S.*\n+> \S',
                                                                first), f'{nb.name} opens with a title and one sentence'
    if nb.stem == 'index': return
    title, module = first.partition('\n')[0][2:].strip(), re.sub(r'^\d+[a-z]?_', '', nb.stem)
    assert title.endswith(f' · {module}') and len(title) > len(module)+6, f'{nb.name} is titled {title!r}: a title for people · {module}'
    assert title.removesuffix(f' · {module}') == sidebar_titles()[nb.name].removesuffix(' ★'), 'the sidebar has another title'
    if '#| default_exp' in '\n'.join(map(docs.src, code(nb))):
        assert '## Export -' in prose(nb)[-1] and 'nbdev_export()' in docs.src(code(nb)[-1]), nb.name

def sidebar_titles():
    "File name -> what the sidebar calls it"
    return {c['href']: c['text'] for part in docs.config()['website']['sidebar']['contents'] for c in part['contents']
            if isinstance(c, dict)}

def following():
    "(chapter, the one that the sidebar has next)"
    pages = [p for p in docs.sidebar() if p[:2].isdigit()]; return list(zip(pages, pages[1:]))

@pytest.mark.parametrize('nb,then', following(), ids=lambda n: n[:-6])
def test_a_chapter_leads_to_the_next(nb, then):
    "Its last paragraph links to the chapter that the sidebar has next"
    said = [t for s in prose(docs.NBS/nb) if (t := s.partition('## Export -')[0].strip())]
    assert f']({then}' in said[-1], f'{nb} ends with: {said[-1][-200:]}'

def commands(root, path=()):
    "(verb, …) -> its options, of the whole command line"
    res = {}
    for name, c in root.commands.items():
        if hasattr(c, 'commands'): res |= commands(c, (*path, name))
        else: res[(*path, name)] = {o for p in c.get_params(c.context_class(c)) for o in (*p.opts, *p.secondary_opts)}
    return res

@functools.cache
def command_line():
    import typer
    from slm.cli import app
    return commands(typer.main.get_command(app))

def faults_of_commands(texts):
    "Calls of `slm` in blocks and in backticks whose verb or option does not exist"
    calls = [l for t in texts for block in re.findall(r'^```\w*\n(.*?)^```', t,
                                                      re.S | re.M) for l in block.splitlines() if l.startswith('slm ')]
    calls += [c for t in texts for c in re.findall(r'`(slm [^`]+)`', re.sub(r'^```.*?^```', '', t, flags=re.S | re.M))]
    bad = []
    for call in calls:
        words = re.sub(r'\s#.*', '', call.replace('\n', ' ')).split()[1:]
        verb = next((v for n in (2, 1) if (v := tuple(words[:n])) in command_line()), None)
        group = any(v[0] == words[0] for v in command_line())
        if not verb and not group and re.fullmatch(r'[a-z][a-z-]*', words[0]): bad.append(f'{call}: no such verb')
        for o in re.findall(r'(?<!\S)(--[a-z][\w-]*)', ' '.join(words)) if verb else ():
            if o not in command_line()[verb] | {'--help'}: bad.append(f'{call}: no option {o}')
    return bad

@chapter
def test_commands_in_prose_are_those_of_the_help(nb):
    assert faults_of_commands(prose(nb)) == []

def test_wrong_commands_are_found():
    good = ['```sh\nslm sft RUN --data chats.jsonl --seq-len 128 # teach --it\nslm rag index a --out b\n```',
            'Say `slm --help`, `slm annotate` or `slm VERB --help`.']
    assert faults_of_commands(good) == []
    assert len(faults_of_commands(['`slm teach RUN`', '```sh\nslm sft RUN --speed 3\n```', '`slm rag ask x --shots 2`'])) == 3

def own_lines(s): return [l for l in s.splitlines() if l.strip() and not l.startswith('#|')]
def seen(s): return not re.search(r'^#\|\s*(hide\b|export\s*$)', s, re.M) # does a reader of the page see this code?

@chapter
def test_exported_cells_can_be_read_at_a_glance(nb):
    for c in code(nb):
        s = docs.src(c)
        if FLAG.search(s):
            lines = own_lines(s)
            assert len(lines) <= 40, f'{nb.name}: an exported cell of {len(lines)} lines: {lines[0]}'

@chapter
def test_lines_fit_the_page(nb):
    for c in code(nb):
        s = docs.src(c); most = 100 if seen(s) else 140
        wide = [l for l in s.splitlines() if len(l) > most and not l.startswith('#|')]
        assert not wide, f'{nb.name}: a line over {most} columns: {wide[0]}'

def test_most_exported_cells_are_short():
    "The longest a reader meets in every second cell"
    sizes = [len(own_lines(docs.src(c))) for nb in CHAPTERS for c in code(nb) if FLAG.search(docs.src(c))]
    assert statistics.median(sizes) <= 15

@pytest.mark.parametrize('folder', ('tests', 'bench', 'tools'))
def test_lines_of_scripts_fit_a_screen(folder):
    wide = [f'{p.name}:{i}' for p in sorted((ROOT/folder).glob('**/*.py'))
            for i,l in enumerate(p.read_text().splitlines(), 1) if len(l) > 140]
    assert wide == []

@chapter
def test_imports_stand_in_cells_of_their_own(nb):
    """The docs build runs every cell that holds an import, at whatever depth: with
    other code in it, that would run too, without what it needs"""
    IMPORT = (ast.Import, ast.ImportFrom)
    for c in code(nb):
        s = docs.src(c)
        if re.search(r'nbdev_export\(|^[%!]', s, re.M) or FLAG.search(s): continue
        tree = ast.parse(s)
        if any(isinstance(n, IMPORT) for n in ast.walk(tree)):
            assert all(isinstance(n, IMPORT) for n in tree.body), f'{nb.name} mixes imports with code:\n{s[:200]}'

@chapter
def test_no_chapter_imports_a_later_one(nb):
    "At the top of a cell: what is imported inside of a function is for the command line, which starts before its heavy parts"
    exports = {p: next((e for c in code(p) if (e := docs.directives(docs.src(c))[0].get('default_exp'))), None) for p in CHAPTERS}
    earlier = {e for p, e in exports.items() if e and (p <= nb or nb.stem == 'index')}
    for c in code(nb):
        for used in re.findall(r'^from slm\.([\w.]+) import', docs.src(c), re.M):
            assert used in earlier, f'{nb.name} imports slm.{used}, which no earlier chapter exports'

@chapter
def test_every_figure_in_prose_has_a_source(nb):
    "The chapter's code or output, a record, a page that is cited, or arithmetic in sight"
    assert docs.figure_faults(nb) == []

def test_a_figure_without_a_source_is_found(tmp_path):
    md = lambda s: dict(cell_type='markdown', source=s)
    prose = ['It makes 93.7 tokens/s.', 'Twice as good: .873 of all.',
             'It takes 41 MB.\n\nMore: [here](https://arxiv.org/abs/1706.03762).', 'Wins 1,234 times.']
    backed = ['It makes 93.5 tokens/s, says `results/x/y/run.json`; results/x.',
              'In 8 bits; a 95 % interval; `x = 3 MB`; $12.34$; 2 · 3 MB = 6 MB; Python 3.11 to 3.13.', 'The log says .25, which is 25 %.',
              'They got 60.5 % ([Nangia et al., 2020](https://aclanthology.org/2020.emnlp-main.154/)).', '```\nslm --rate 99.99 %\n```',
              'Trained for 30 seconds.']
    code = dict(cell_type='code', source='train(seconds=30)',
                outputs=[dict(output_type='stream', text='0.25 of them, 25 per cent'),
                         dict(output_type='execute_result', data={'text/plain': 'y'})])
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=[code, *map(md, prose+backed)])))
    found = docs.figure_faults(tmp_path/'x.ipynb')
    assert [re.search("'(.*?)'", f)[1] for f in found] == ['93.7 tokens/s', '.873', '41 MB', '1,234 times']

@chapter
def test_stored_outputs_are_whole_and_name_no_machine(nb):
    shown = [c for c in code(nb) if c['outputs']]
    if any(FLAG.search(docs.src(c)) for c in code(nb)): assert shown, f'{nb.name} shows nothing: make run NB=nbs/{nb.name}'
    for c in shown:
        for o in c['outputs']:
            assert o['output_type'] != 'error', f"{nb.name} stores an error: {o.get('ename')}"
            text = json.dumps({k: v for k, v in o.get('data', {}).items() if not k.startswith('image/')}) + ''.join(o.get('text', ''))
            assert not re.search(r'/tmp/|/home/|/root/|/Users/|/var/folders/|site-packages',
                                 text), f'{nb.name} prints a path of one machine:\n{docs.src(c)[:200]}'
    assert nb.stat().st_size < 2**21, f'{nb.name} is over 2 MiB'


def test_recipes_follow_the_formulas():
    r = subprocess.run([sys.executable, str(ROOT/'tools'/'recipes.py'), '--check'], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout+r.stderr
