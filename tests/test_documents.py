"PDF, HTML, Word and tables as documents; the encoders that an index may have; readers at an address."
import io, subprocess, sys, zipfile
from pathlib import Path
import pytest
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
        objs += [f'{10+2*k} 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {11+2*k} 0 R/Resources<</Font<</F1 3 0 R>>>>>>endobj',
                 f'{11+2*k} 0 obj<</Length {len(s)}>>stream\n{s}\nendstream endobj']
    return '\n'.join(['%PDF-1.4', *objs, 'trailer<</Root 1 0 R>>', '%%EOF']).encode()

def docx(body, **more):
    "A Word file with this body"
    file = io.BytesIO(); w = 'http://schemas.openxmlformats.org/wordprocessingml/2006/main'
    kind = 'application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml'
    parts = {'[Content_Types].xml': '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension="rels" '
             'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="xml" ContentType="application/xml"/>'
             f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
             '_rels/.rels': '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r1" '
             'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>',
             'word/document.xml': f'<w:document xmlns:w="{w}"><w:body>{body}</w:body></w:document>',
             'word/styles.xml': f'<w:styles xmlns:w="{w}"><w:style w:type="paragraph" w:styleId="H1"><w:name w:val="heading 1"/></w:style></w:styles>',
             'word/_rels/document.xml.rels': '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r2" '
             'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/styles" Target="styles.xml"/></Relationships>'}
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z:
        for name,text in (parts | more).items(): z.writestr(name, text)
    return file.getvalue()

def par(text, style=''): return f'<w:p>{style and f"<w:pPr><w:pStyle w:val={chr(34)}{style}{chr(34)}/></w:pPr>"}<w:r><w:t>{text}</w:t></w:r></w:p>'

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
    page = f'<html><head>{head}<style>h1 {{}}</style></head><body><h1>Café</h1><p>Où est <b>la lampe</b>?<script>no()</script></body></html>'
    assert read(tmp_path/'a.html', page.encode(charset)) == [('Café', 'Où est **la lampe**?')]

@needs
def test_the_ending_may_be_in_capitals(tmp_path): assert read(tmp_path/'A.PDF', pdf('A lamp.')) == [('', 'A lamp.')]

@pytest.mark.parametrize('sep', [',', ';', '\t', '|'])
def test_every_row_of_a_table_says_what_its_cells_mean(tmp_path, sep):
    rows = sep.join(['id', 'town', 'mayor'])+'\r\n'+sep.join(['7', 'Wick', '"Ada ""the, old"" Lee;\nesq."'])+'\r\n'+sep.join(['8', 'Ham', ''])+'\r\n'
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
    for name,data in (('a.pdf', b'no'), ('b.pdf', pdf('A lamp.')), ('c.docx', docx(par('A cat.'))), ('d.png', b''), ('e', b'')): (tmp_path/name).write_bytes(data)
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
    assert [d.text for d in r] == ['A lamp.'] and len(r.bad) == 1 and 'a.html' in r.bad[0]

@needs
def test_the_reading_process_has_no_network_and_starts_nothing(tmp_path):
    code = R._WORKER.split('for line in')[0]+'''
import socket, subprocess
for f in (lambda: socket.create_connection(('127.0.0.1', 9)), lambda: subprocess.run(['true']), lambda: os.system('true')):
    try: f(); print('done')
    except PermissionError as e: print('refused', file=out)
'''
    said = subprocess.run([sys.executable, '-c', code, str(2**31), '60', '100'], capture_output=True, text=True)
    assert said.stdout.split() == ['refused']*3, said.stderr

def test_without_the_library_a_page_says_what_to_install(tmp_path, monkeypatch):
    real = R.find_spec; monkeypatch.setattr(R, 'find_spec', lambda m: None if m == 'markitdown' else real(m))
    (tmp_path/'a.pdf').write_bytes(pdf('A lamp.')); (tmp_path/'b.md').write_text('A cat.')
    with pytest.raises(SLMError, match=r"pip install -e '\.\[documents\]'"): list(documents([tmp_path/'a.pdf']))
    r = Reading([tmp_path], strict=False); assert [d.text for d in r] == ['A cat.'] and 'documents' in r.bad[0]
