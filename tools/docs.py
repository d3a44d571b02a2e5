"""The site and the README from the notebooks.

docs.py readme [--check]    write README.md from nbs/index.ipynb, or only tell whether it is in step
docs.py config              check nbs/_quarto.yml against Quarto's schema, the sidebar against the chapters, the bibliography
docs.py site [--smalldocs]  all of it, every link, and the rendered site in _docs: by Quarto where it is installed, else by smalldocs
"""
import html, json, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path
from urllib.parse import unquote
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, SITE, DOCS = ROOT/'nbs', ROOT/'_proc', ROOT/'_proc_site', ROOT/'_docs'
BIN = Path(sys.executable).parent

def src(cell): return ''.join(cell['source'])
def cells(path): return json.loads(Path(path).read_text(encoding='utf-8'))['cells']

def tool(name):
    "The path of one of the environment's commands"
    p = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    return p or sys.exit(f"docs: '{name}' is missing: make install")

# ---- README.md

def directives(code):
    "The `#|` lines at the top of a code cell as a dict, and the code without them"
    d = {}
    lines = code.splitlines()
    while lines and (m := re.match(r'#\|\s*([\w-]+):?\s*(.*)', lines[0])): d[m[1]] = m[2].strip(); lines.pop(0)
    return d, '\n'.join(lines).strip('\n')

def chapter_links(md):
    "Links to chapters, and to files of the repository, as seen from its top"
    md = re.sub(r'(\]\()(?!https?:|#|mailto:|\.\./)([^)\s]+)', r'\1nbs/\2', md).replace('](../', '](')
    return re.sub(r'(\]\()https://github\.com/slm-book/slm/(?:tree|blob)/main/', r'\1', md)

def show_output(o):
    "Markdown for one stored output: Markdown as it is, else text as an indented block (pictures stay in the notebook)"
    d = o.get('data', {})
    if 'text/markdown' in d: return chapter_links(''.join(d['text/markdown']))
    text = ''.join(d.get('text/plain') or o.get('text') or '') if 'image/png' not in d else ''
    text = re.sub(r'\x1b\[[0-9;]*m', '', text).rstrip()
    return '\n'.join(f'    {l}'.rstrip() for l in text.splitlines())

def readme():
    "The text of README.md"
    res = []
    for i, c in enumerate(cells(NBS/'index.ipynb')):
        s = src(c).strip('\n')
        if c['cell_type'] == 'markdown':
            if re.match(r'#+ .* -$', s.strip()): continue
            res.append(chapter_links(re.sub(r'^> ', '', s, flags=re.M) if i == 0 else s))
            if i == 0: res.append('<!-- Written by `make prepare` from nbs/index.ipynb: edit that. -->')
        elif c['cell_type'] == 'code':
            d, code = directives(s)
            if {'hide', 'default_exp'} & d.keys() or d.get('include') == 'false': continue
            lang = 'sh' if re.match(r'%%(bash|sh)\b', code) else 'python'
            if lang == 'sh': code = code.partition('\n')[2]
            if d.get('echo') != 'false' and code.strip(): res.append(f'``` {lang}\n{code}\n```')
            if d.get('output') != 'false': res += [show_output(o) for o in c.get('outputs', [])]
    return '\n\n'.join(r.strip('\n') for r in res if r.strip())+'\n'

def in_step():
    "Whether README.md is what index.ipynb says"
    p = ROOT/'README.md'
    return p.exists() and p.read_text(encoding='utf-8') == readme()

# ---- configuration, sidebar, bibliography

def config():
    "nbs/_quarto.yml with what nbdev adds to it from settings.ini"
    from nbdev.config import get_config
    cfg, c = get_config(path=ROOT), yaml.safe_load((NBS/'_quarto.yml').read_text(encoding='utf-8'))
    c['project'] = {**c.get('project', {}), 'output-dir': cfg.doc_path.name}
    c['website'] = {**c['website'], 'title': cfg.title, 'site-url': cfg.doc_host+cfg.doc_baseurl, 'description': cfg.description,
                    'repo-branch': cfg.branch, 'repo-url': cfg.git_url}
    return c

def schema_faults(conf=None):
    """What is not as Quarto's published schema has it, one line each.

    panache carries that schema. It checks a project's own keys in `_quarto.yml`; page options, which a project leaves open, are
    checked as a page's front matter, and by name against the list of Quarto's page options that smalldocs carries.
    """
    from smalldocs.config import HTML_OPTIONS
    from smalldocs.quarto_keys import QUARTO_PAGE_OPTIONS
    conf = conf or config()
    own = {k: v for k,v in conf.items() if k not in ('project', 'website', 'format', 'metadata-files')}
    opts = own | conf.get('format', {}).get('html', {})
    with tempfile.TemporaryDirectory(prefix='slm-docs-') as tmp:
        page = yaml.safe_dump({'title': 'x', **{k: v for k, v in opts.items() if k != 'bibliography'}}, sort_keys=False)
        for name, text in (('_quarto.yml', yaml.safe_dump(conf, sort_keys=False)), ('page-options.qmd', f'---\n{page}---\n\nx\n')):
            (Path(tmp)/name).write_text(text, encoding='utf-8')
        r = subprocess.run([tool('panache'), 'lint', '--isolated', '--no-cache', '--color', 'never', '--message-format', 'short',
                            '--select', 'quarto-schema', '--extend-select', 'quarto-schema-unknown-key', '_quarto.yml', 'page-options.qmd'],
                           cwd=tmp, capture_output=True, text=True)
        out = (r.stdout+r.stderr).replace(str(Path(tmp).resolve())+os.sep, '').replace(tmp+os.sep, '')
    bad = [l for l in out.splitlines() if re.search(r': (warning|error)\[', l)]
    if r.returncode and not bad: bad = [f'panache failed: {out.strip()}']
    return bad + [f'_quarto.yml: unknown page option `{k}`' for k in opts if k not in QUARTO_PAGE_OPTIONS
                  | HTML_OPTIONS | {'link-citations'}]

def chapters():
    "The names of all pages in nbs/, in order"
    return sorted(p.name for pat in ('*.ipynb', '*.qmd') for p in NBS.glob(pat) if p.name[0] not in '._')

def sidebar(contents=None):
    "The pages that the sidebar lists, in order"
    contents = config()['website']['sidebar']['contents'] if contents is None else contents
    return [p for c in contents for p in ([c] if isinstance(c, str) else sidebar(c['contents']) if 'contents' in c else [c['href']])]

def sidebar_faults():
    "Chapters that the sidebar lacks, pages that it lists in vain or twice, chapters out of order"
    listed, there = sidebar(), chapters()
    bad = [f'_quarto.yml: the sidebar lacks {n}' for n in there if n not in listed]
    bad += [f'_quarto.yml: the sidebar lists {n}, which is not in nbs/' for n in listed if n not in there]
    bad += [f'_quarto.yml: the sidebar lists {n} twice' for n in {n for n in listed if listed.count(n) > 1}]
    nums = [n for n in listed if n[:2].isdigit()]
    return bad + (['_quarto.yml: the sidebar is not in the order of the chapters'] if nums != sorted(nums) else [])

def bibliography():
    "references.bib as a list of dicts (one field a line, as the file is written)"
    text = (NBS/'references.bib').read_text(encoding='utf-8')
    res = [{'type': m[1], 'key': m[2],
            **{k: v.replace('{', '').replace('}', '') for k, v in re.findall(r'^\s*(\w+)\s*=\s*\{(.*)\},?$', m[3], re.M)}}
           for m in re.finditer(r'^@(\w+)\{(\S+),\n(.*?)^\}', text, re.M | re.S)]
    assert len(res) == len(re.findall(r'^@', text, re.M)), 'references.bib: an entry is not written one field a line'
    return res

PAPER = re.compile(r'https?://(?:arxiv\.org/(?:abs|pdf)/|doi\.org/|dx\.doi\.org/|aclanthology\.org/|openreview\.net/forum)[^\s)\]>"\'`]+')

def norm(url):
    "One spelling for one paper"
    url = re.sub(r'^https?://(dx\.)?', 'https://', url.lower().rstrip('.,;/'))
    return re.sub(r'(arxiv\.org)/(?:pdf|abs)/([\w.]+?)(v\d+)?(\.pdf)?$', r'\1/abs/\2', url)

def cited():
    "Paper link -> chapters that give it"
    res = {}
    for p in sorted(NBS.glob('*.ipynb')):
        for c in cells(p):
            for u in PAPER.findall(src(c)): res.setdefault(norm(u), []).append(p.name)
    return res

def bibliography_faults():
    "Papers that a chapter links to and references.bib lacks"
    have = {norm(e['url']) for e in bibliography() if 'url' in e}
    return [f'references.bib lacks {u}, which {ns[0]} cites' for u, ns in cited().items() if u not in have]

# ---- figures in prose

UNIT = (r'%|×|per cent\b|times\b|(?:m|µ|n)?s\b|seconds?\b|minutes?\b|hours?\b|days?\b|[kMGT]i?B(?:/s)?\b|'
        r'bits?(?:/byte| per byte)?\b|nats?\b|'
        r'tokens(?:/s| a second)\b|[MGTP]?FLOP(?:/s|s)?\b|W\b|k?Wh\b|perplexity\b|points?\b')
FIGURE = re.compile(rf'(?<![\w.,/@#–-])(\d[\d,]*(?:\.\d+)?|\.\d+) ?({UNIT})|(?<![\w.,/@#–-])(\d*\.\d{{2,}})(?![\w.])')

def figures(paragraph):
    """The figures of a paragraph: numbers with a unit, and numbers with two decimals or more; not
    in code and formulas, not the widths of numbers (8 bits), not 95 % intervals"""
    text = re.sub(r'`[^`]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]*>|Python 3[\d. to]*', ' ', paragraph)
    said = (s for s in re.split(r'(?<=[.!?:;])\s+', text) if '=' not in s)
    for m in (m for s in said for m in FIGURE.finditer(s)):
        number, unit = m[1] or m[3], m[2] or ''
        if ((unit.startswith('bit') and '/' not in unit and 'per' not in unit and re.fullmatch(r'\d+', number))
            or (number, unit) == ('95', '%')):
            continue
        yield number, m[0]

def figure_faults(path):
    """Figures in a chapter's prose that nothing backs. What backs one: the chapter's code or
    its stored output holds the number; its paragraph names a record (`results/…`) or cites a
    page of the web; or it is computed before the reader's eyes ("= 42.7 GB/s")."""
    cs = cells(path)
    run = '\n'.join(src(c)+'\n'+'\n'.join(''.join(v) for o in c['outputs']
                                          for k,v in {'text': o.get('text', ''), **o.get('data', {})}.items() if k.startswith('text'))
                                      for c in cs if c['cell_type'] == 'code')
    held = set(re.findall(r'\d+\.?\d*|\.\d+', run.replace(',', '').replace('_', ''))); held |= {h.removeprefix('0') for h in held}
    bad = []
    for c in cs:
        if c['cell_type'] != 'markdown': continue
        for par in re.split(r'\n\s*\n', re.sub(r'^```.*?^```', '', src(c), flags=re.S | re.M)):
            if re.search(r'https?://|results/', par): continue
            bad += [f"{path.name}: '{said}' in \"{' '.join(par.split())[:90]}…\""
                    for n,said in figures(par) if n.replace(',', '').removeprefix('0') not in held]
    return bad

# ---- the site

def process():
    "nbdev's own pipeline, less its installer of Quarto: nbs/ with links and signatures in _proc/; returns the chapters it cannot do"
    from nbdev.processors import FilterDefaults
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve_drv import exec_nb
    shutil.rmtree(PROC, ignore_errors=True); PROC.mkdir()
    refresh_quarto_yml(); os.environ['IN_TEST'] = '1'
    faults = []
    for p in sorted(NBS.iterdir()):
        if p.name[0] in '._' and p.name != '_quarto.yml': continue
        if p.is_dir(): shutil.copytree(p, PROC/p.name)
        elif p.suffix != '.ipynb': shutil.copy2(p, PROC/p.name)
        else:
            try: exec_nb(p, PROC/p.name, FilterDefaults)
            except Exception as e: faults.append(f'{p.name}: {str(e).strip()}\n  {type(e.__cause__).__name__}: {e.__cause__}')
    del os.environ['IN_TEST']
    return faults

def reference_list():
    "The bibliography as a Markdown list, for a renderer that has none"
    def line(e):
        who = re.sub(r' and others$', ' et al.', e.get('author', '')).replace(' and ', '; ')
        where = next((e[k] for k in ('journal', 'booktitle', 'institution', 'publisher', 'howpublished') if k in e), '')
        return f"- {who} ({e.get('year', 'n.d.')}). [{e['title']}]({e['url']}){'. *'+where+'*' if where else ''}."
    return '\n'.join(line(e) for e in sorted(bibliography(), key=lambda e: (e.get('author', '').lower(), e.get('year', ''))))

# What smalldocs does not read and would report: it has no citations, and its grid is in styles.css
QUARTO_ONLY = ('bibliography', 'link-citations')

def flatten():
    "Copy _proc/ to _proc_site/ as smalldocs wants it: page names as Quarto's `output-file`, links within the site relative"
    from nbdev.config import get_config
    cfg = get_config(path=ROOT)
    base = f'{cfg.doc_host}{cfg.doc_baseurl}'.rstrip('/')+'/'
    shutil.rmtree(SITE, ignore_errors=True); shutil.copytree(PROC, SITE, ignore=shutil.ignore_patterns(cfg.doc_path.name))
    name = {}
    for p in SITE.glob('*.ipynb'):
        if (m := re.search(r'^output-file: (\S+)\.html$', src(cells(p)[0]), re.M)): name[p.name] = f'{m[1]}.ipynb'
    old = re.compile(r'(?<![\w/.-])('+'|'.join(map(re.escape, name))+')')
    def sub(s): return re.sub(r'^output-file:.*\n', '', old.sub(lambda m: name[m[1]], s).replace(base, ''), flags=re.M)
    conf = {k: v for k, v in yaml.safe_load((SITE/'_quarto.yml').read_text(encoding='utf-8')).items() if k not in QUARTO_ONLY}
    conf['format']['html'].pop('grid', None)
    (SITE/'_quarto.yml').write_text(old.sub(lambda m: name[m[1]], yaml.safe_dump(conf, sort_keys=False)), encoding='utf-8')
    for p in SITE.glob('*.qmd'):
        p.write_text(sub(p.read_text(encoding='utf-8').replace('::: {#refs}\n:::', reference_list())), encoding='utf-8')
    for p in list(SITE.glob('*.ipynb')):
        nb = json.loads(p.read_text(encoding='utf-8'))
        for c in nb['cells']:
            if c['cell_type'] != 'code': c['source'] = sub(src(c))
            for o in c.get('outputs', []):
                if 'text/markdown' in o.get('data', {}): o['data']['text/markdown'] = sub(''.join(o['data']['text/markdown']))
        p.unlink(); p.with_name(name.get(p.name, p.name)).write_text(json.dumps(nb), encoding='utf-8')

def smalldocs():
    "Check and render _proc_site/ into _docs/; returns how many things are wrong"
    flatten()
    checked = subprocess.run([tool('smalldocs'), 'check', str(SITE)], capture_output=True, text=True)
    print(checked.stdout, end=''); print(checked.stderr.strip())
    if subprocess.run([tool('smalldocs'), 'render', '--quiet', str(SITE)]).returncode: sys.exit('docs: smalldocs could not render the site')
    shutil.rmtree(DOCS, ignore_errors=True); shutil.move(SITE/DOCS.name, DOCS)
    return checked.returncode

def quarto():
    "Render with Quarto by nbdev_docs, which leaves README.md alone because it is newer than the notebook"
    (ROOT/'README.md').touch()
    return subprocess.run([tool('nbdev_docs')], cwd=ROOT).returncode

def dead_links(root=None):
    "Links within the rendered site, symbols' included, whose page or anchor is not there"
    from nbdev.config import get_config
    root, cfg = root or DOCS, get_config(path=ROOT)
    base = f'{cfg.doc_host}{cfg.doc_baseurl}/'
    pages = {p.relative_to(root).as_posix(): p.read_text(encoding='utf-8') for p in root.rglob('*.html')}
    ids = {n: set(re.findall(r'\s(?:id|name)="([^"]+)"', t)) for n, t in pages.items()}
    bad = {}
    for n, t in sorted(pages.items()):
        for url in sorted(set(re.findall(r'<a\s[^>]*?href="([^"]+)"', t))):
            path, _, frag = unquote(html.unescape(url)).removeprefix(base).partition('#')
            if re.match(r'[a-z]+:|//', path): continue
            path = os.path.normpath(os.path.join(os.path.dirname(n), path.partition('?')[0])) if path else n
            if path == '.' or path.endswith('/'): path = 'index.html'
            if not (root/path).exists(): bad.setdefault(f'no page for {url}', []).append(n)
            elif frag and path in ids and frag not in ids[path]: bad.setdefault(f'no anchor for {url}', []).append(n)
    return [f"{ns[0]}{f' and {len(ns)-1} more' if ns[1:] else ''}: {what}" for what, ns in bad.items()]

def config_faults():
    "All that can be checked without rendering"
    return schema_faults() + sidebar_faults() + bibliography_faults()

def site(quarto_too=True):
    "Check everything, render the site; exit 1 with one line for each fault"
    faults = config_faults() + ([] if in_step() else ['README.md is not in step with nbs/index.ipynb: make prepare'])
    if quarto_too and shutil.which('quarto'): rc, by = quarto(), 'Quarto'
    else: faults += process(); rc, by = smalldocs(), 'smalldocs'
    faults += dead_links()
    print('\n'.join(faults)) if faults else None
    if rc or faults: sys.exit(f'docs: {len(faults)} fault(s) in configuration and links'+(f', and {by} found more (above)' if rc else ''))
    print(f'docs: {len(list(DOCS.rglob("*.html")))} pages by {by} in _docs/index.html, every link leads somewhere')

def main(args):
    os.chdir(ROOT); sys.path.insert(0, str(ROOT))
    if args == ['readme']: (ROOT/'README.md').write_text(readme(), encoding='utf-8', newline='\n')
    elif args == ['readme', '--check']: in_step() or sys.exit('README.md is not in step with nbs/index.ipynb: make prepare')
    elif args == ['config']: sys.exit('\n'.join(config_faults()) or None)
    elif args == ['site']: site()
    elif args == ['site', '--smalldocs']: site(quarto_too=False)
    else: sys.exit(__doc__.strip())

if __name__ == '__main__': main(sys.argv[1:])
