"PDF, HTML, Word and tables as documents; the encoders that an index may have; readers at an address."
import io, subprocess, sys, zipfile
from pathlib import Path
import forked, pytest
from slm.core import SLMError
pytest.importorskip('txtai', reason='needs: pip install txtai'); pytest.importorskip('xllamacpp', reason='needs: pip install xllamacpp')
from slm.serve import rag as R
from slm.serve.rag import Document, Index, Reading, chunks, documents

ROOT = Path(__file__).resolve().parent.parent

# ---- files that are no plain text

def pdf(*pages):
    "A PDF of one line a page, written by hand"
    kids = ' '.join(f'{10+2*k} 0 R' for k in range(len(pages)))
    objs = ['1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj', f'2 0 obj<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>endobj',
            '3 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj']
    for k,text in enumerate(pages):
        s = f'BT /F1 12 Tf 72 700 Td ({text}) Tj ET' if text else ''
        objs += [f'{10+2*k} 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {11+2*k} 0 R/Resources<</Font<</F1 '
                 '3 0 R>>>>>>endobj', f'{11+2*k} 0 obj<</Length {len(s)}>>stream\n{s}\nendstream endobj']
    return '\n'.join(['%PDF-1.4', *objs, 'trailer<</Root 1 0 R>>', '%%EOF']).encode()

def docx(body, **more):
    "A Word file with this body"
    file = io.BytesIO(); w = 'http://schemas.openxmlformats.org/wordprocessingml/2006/main'
    kind = 'application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml'
    parts = {'[Content_Types].xml': '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default '
             'Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default '
             f'Extension="xml" ContentType="application/xml"/><Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
             '_rels/.rels': '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship '
             'Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
             'Target="word/document.xml"/></Relationships>',
             'word/document.xml': f'<w:document xmlns:w="{w}"><w:body>{body}</w:body></w:document>',
             'word/styles.xml': f'<w:styles xmlns:w="{w}"><w:style w:type="paragraph" w:styleId="H1"><w:name '
             'w:val="heading 1"/></w:style></w:styles>', 'word/_rels/document.xml.rels': '<Relationships '
             'xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r2" '
             'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/styles" Target="styles.xml"/></Relationships>'}
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z:
        for name,text in (parts | more).items(): z.writestr(name, text)
    return file.getvalue()

def par(text, style=''):
    return f'<w:p>{style and f"<w:pPr><w:pStyle w:val={chr(34)}{style}{chr(34)}/></w:pPr>"}<w:r><w:t>{text}</w:t></w:r></w:p>'

def read(path, data):
    path.write_bytes(data)
    return [(c.heading, c.text) for d in documents([path]) for c in chunks(d)]

needs = pytest.mark.skipif(not R.find_spec('markitdown'), reason="needs: pip install 'markitdown[pdf,docx]'")

@needs
def test_a_pdf_is_read_page_by_page(tmp_path):
    text = read(tmp_path/'a.pdf', pdf('The lamp is in the hall.', 'The cat is out.'))
    assert [t.splitlines() for _,t in text] == [['The lamp is in the hall.', '', '', 'The cat is out.']]

@needs
def test_headings_of_a_word_file_are_headings(tmp_path):
    assert read(tmp_path/'a.docx', docx(par('Lamps', 'H1')+par('One is in the hall.'))) == [('Lamps', 'One is in the hall.')]

@needs
@pytest.mark.parametrize('charset,head', [('utf-8', ''), ('windows-1252', '<meta charset="windows-1252">'), ('utf-16', '')])
def test_a_web_page_is_read_in_its_own_characters(tmp_path, charset, head):
    page = (f'<html><head>{head}<style>h1 {{}}</style></head><body><h1>Café</h1><p>Où est <b>la '
            'lampe</b>?<script>no()</script></body></html>')
    assert read(tmp_path/'a.html', page.encode(charset)) == [('Café', 'Où est **la lampe**?')]

@needs
def test_the_ending_may_be_in_capitals(tmp_path): assert read(tmp_path/'A.PDF', pdf('A lamp.')) == [('', 'A lamp.')]

@pytest.mark.parametrize('sep', [',', ';', '\t', '|'])
def test_every_row_of_a_table_says_what_its_cells_mean(tmp_path, sep):
    rows = sep.join(['id', 'town', 'mayor'])+'\r\n'+sep.join(['7', 'Wick',
                                                              '"Ada ""the, old"" Lee;\nesq."'])+'\r\n'+sep.join(['8', 'Ham', ''])+'\r\n'
    (tmp_path/'t.csv').write_bytes(rows.encode('utf-8-sig')); found = list(documents([tmp_path/'t.csv']))
    assert [(d.id, d.text) for d in found] == [('t.csv:7', 'town: Wick\nmayor: Ada "the, old" Lee;\nesq.'), ('t.csv:8', 'town: Ham')]

def test_a_quote_far_down_a_table_is_a_quote(tmp_path):
    (tmp_path/'t.csv').write_text('a,b\n'+'x,"y"\n'*3000+'x,"say ""y"", then"\n')
    assert list(documents([tmp_path/'t.csv']))[-1].text == 'a: x\nb: say "y", then'

@needs
@pytest.mark.parametrize('name,data,says', [
    ('a.pdf', b'%PDF-1.4 and then nothing', 'cannot be read as PDF'), ('b.pdf', pdf(''), 'holds no text'),
    ('c.docx', b'PK no', 'cannot be read as DOCX'), ('d.docx', docx('<w:p>')[:200], 'cannot be read as DOCX'),
    ('e.html', b'', 'holds no text'), ('f.pdf', b'', 'cannot be read as PDF')])
def test_a_bad_page_is_one_line(tmp_path, name, data, says):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(SLMError, match=says) as e: list(documents([tmp_path/name]))
    assert '\n' not in str(e.value) and name in str(e.value)

@needs
def test_a_bad_page_does_not_stop_its_folder(tmp_path):
    for name,data in (('a.pdf', b'no'), ('b.pdf', pdf('A lamp.')), ('c.docx', docx(par('A cat.'))), ('d.png', b''), ('e', b'')):
        (tmp_path/name).write_bytes(data)
    r = Reading([tmp_path], strict=False)
    assert [d.text.strip() for d in r] == ['A lamp.', 'A cat.']
    assert len(r.bad) == 1 and 'a.pdf' in r.bad[0] and dict(r.kinds) == {'.png': 1, 'no ending': 1}

@needs
def test_a_word_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    (tmp_path/'bomb.docx').write_bytes(docx(par('A lamp.'), **{'word/x.xml': bytes(2**29)}))
    with pytest.raises(SLMError, match='unpacks to 537 MB'): list(documents([tmp_path/'bomb.docx']))

@pytest.fixture
def limits(monkeypatch):
    "Set the limits of the reading process; it is started anew before and after"
    def end():
        for p in R._WORKERS: p.kill(); p.wait()
    def set_(**kw):
        end(); [monkeypatch.setattr(R, k, v) for k,v in kw.items()]
    yield set_
    end()

@needs
def test_a_page_that_takes_too_long_is_left_and_the_next_one_read(tmp_path, limits):
    limits(PAGE_SECONDS=3)
    (tmp_path/'a.html').write_text('<div>'*400+'<p>x</p>'*2_000_000); (tmp_path/'b.html').write_text('<p>A lamp.')
    r = Reading([tmp_path], strict=False)
    assert [d.text for d in r] == ['A lamp.'] and 'a.html' in r.bad[0] and 'within 3 s' in r.bad[0]

@needs
def test_a_page_that_takes_too_much_memory_is_left_and_the_next_one_read(tmp_path, limits):
    limits(PAGE_MEMORY=2**29)
    (tmp_path/'a.html').write_text('<p>x</p>'*1_500_000); (tmp_path/'b.html').write_text('<p>A lamp.')
    r = Reading([tmp_path], strict=False)
    assert [d.text for d in r] == ['A lamp.'] and len(r.bad) == 1 and 'a.html' in r.bad[0] and 'within 0.5 GB' in r.bad[0]

@needs
def test_the_reading_process_has_no_network_and_starts_nothing(tmp_path):
    code = R._WORKER.split('for line in')[0]+'''
import socket, subprocess
for f in (lambda: socket.create_connection(('127.0.0.1', 9)), lambda: subprocess.run(['true']), lambda: os.system('true')):
    try: f(); print('done')
    except PermissionError as e: print('refused', file=out, flush=True)
'''
    said = subprocess.run([sys.executable, '-c', code, str(2**31), '60', '100'], capture_output=True, text=True)
    assert said.stdout.split() == ['refused']*3, said.stderr

def test_without_the_library_a_page_says_what_to_install(tmp_path, monkeypatch):
    real = R.find_spec; monkeypatch.setattr(R, 'find_spec', lambda m: None if m == 'markitdown' else real(m))
    (tmp_path/'a.pdf').write_bytes(pdf('A lamp.')); (tmp_path/'b.md').write_text('A cat.')
    with pytest.raises(SLMError, match=r"pip install -e '\.\[documents\]'"): list(documents([tmp_path/'a.pdf']))
    r = Reading([tmp_path], strict=False); assert [d.text for d in r] == ['A cat.'] and 'documents' in r.bad[0]

# ---- encoders

TOWNS = [Document('a', 'The lamp is in the hall.'), Document('b', 'A cat sleeps on the roof.')]

def static(path, size=16, seed=0):
    "A static model: a random vector a word"
    model2vec = pytest.importorskip('model2vec', reason='needs: pip install model2vec')
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = sorted({w for d in TOWNS for w in R.words(d.text)} | R.words(R.PROBE))
    tok = Tokenizer(models.WordLevel({w: k for k,w in enumerate(['[UNK]', *words])}, '[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    model2vec.StaticModel(np.random.default_rng(seed).normal(size=(len(words)+1, size)).astype('float32'), tok,
                          config=dict(model_type='model2vec')).save_pretrained(path)
    return str(path)

def made(path, embeddings):
    with_ = Index(path, True, embeddings); with_.upsert(TOWNS); card = dict(with_.card); with_.close()
    return card

def test_a_static_model_is_an_encoder_with_dimensions_of_its_own(tmp_path):
    m = static(tmp_path/'m'); card = made(tmp_path/'ix', m)
    assert (card['embeddings'], card['dimensions'], card['language']) == ('m', 16, 'simple')
    ix = Index(tmp_path/'ix', embeddings=m)
    assert ix.search('lamp hall', 1, 'vectors')[0].source == 'a' and ix.search('cat roof', 1, 'vectors')[0].source == 'b'
    ix.close()

def test_a_transformer_of_ones_own_is_an_encoder(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizer
    (tmp_path/'m').mkdir()
    (tmp_path/'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'lamp', 'cat', 'the']))
    BertTokenizer(str(tmp_path/'vocab.txt')).save_pretrained(tmp_path/'m')
    BertModel(BertConfig(vocab_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=8)).save_pretrained(tmp_path/'m')
    assert made(tmp_path/'ix', str(tmp_path/'m'))['dimensions'] == 12

@pytest.mark.parametrize('size,seed', [(16, 1), (8, 0)])
def test_an_index_is_not_asked_with_another_encoder(tmp_path, size, seed):
    m, other = static(tmp_path/'m'), static(tmp_path/'other', size, seed); made(tmp_path/'ix', m)
    with pytest.raises(SLMError, match='give --embeddings m'): Index(tmp_path/'ix')
    with pytest.raises(SLMError, match='made with the encoder m'): Index(tmp_path/'ix', embeddings=other)
    with pytest.raises(SLMError, match='give --embeddings m'): Index(tmp_path/'ix', embeddings='none')
    with pytest.raises(SLMError, match='made with the encoder m'): Index(tmp_path/'ix', True, other)
    Index(tmp_path/'ix', True, m).close()

def test_words_alone_when_that_is_wanted(tmp_path, recwarn):
    assert 'embeddings' not in made(tmp_path/'ix', 'none') and not [w for w in recwarn if 'words alone' in str(w.message)]
    ix = Index(tmp_path/'ix'); assert ix.search('lamp', 1)[0].source == 'a'; ix.close()
    with pytest.raises(SLMError, match='has words alone: make it anew'): Index(tmp_path/'ix', embeddings=static(tmp_path/'m'))

def test_the_default_is_the_package_else_the_hub_else_words(tmp_path, monkeypatch):
    monkeypatch.setattr(R, 'minilm', lambda: '/there'); monkeypatch.setattr(R, '_on_hub', lambda n: pytest.fail('the package is there'))
    assert R.find_encoder().path == '/there'
    monkeypatch.setattr(R, 'minilm', lambda: None); monkeypatch.setattr(R, '_on_hub', lambda n: True)
    assert R.find_encoder() == R.Encoder(R.MINILM, R.MINILM, 'english')
    monkeypatch.setattr(R, '_on_hub', lambda n: False)
    assert R.find_encoder() is None
    with pytest.warns(UserWarning, match='by their words alone'): Index(tmp_path/'ix', True).close()

@pytest.mark.parametrize('what', ['empty', 'text', 'config', 'nowhere/at-all'])
def test_what_is_no_encoder_is_one_line_and_leaves_no_index(tmp_path, what, monkeypatch):
    monkeypatch.setattr(R, '_on_hub', lambda n: False); (tmp_path/'empty').mkdir(); (tmp_path/'text').write_text('no model')
    (tmp_path/'config').mkdir(); (tmp_path/'config'/'config.json').write_text('{"model_type": "bert"')
    name = str(tmp_path/what) if what[0] != 'n' else what
    with pytest.raises(SLMError, match='no encoder') as e: Index(tmp_path/'ix', True, name)
    assert '\n' not in str(e.value) and what in str(e.value) and not (tmp_path/'ix').exists()

# ---- on the command line

def rag(tmp_path, *args):
    r = forked.run('rag', *args, cwd=ROOT)
    return r.returncode, r.stdout, r.stderr

def test_the_command_tells_what_it_left_out_and_keeps_to_the_encoder(tmp_path):
    m, d = static(tmp_path/'m'), tmp_path/'d'; d.mkdir()
    (d/'a.md').write_text('The lamp is in the hall.'); (d/'b.md').write_bytes(b'Caf\xe9'); (d/'c.png').write_bytes(b'')
    code, out, err = rag(tmp_path, 'index', d, '--out', tmp_path/'ix', '--embeddings', m, '--json')
    assert code == 0 and '"skipped": 1' in out and 'b.md' in err and '1 file of other kinds skipped: .png 1' in err
    code, out, err = rag(tmp_path, 'index', d, '--out', tmp_path/'ix')
    assert code == 2 and 'give --embeddings m' in err and len(err.splitlines()) == 1
