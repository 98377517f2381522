"""The labelled set that masking is measured on: personal data and secrets, and what only looks like them.

A value is put into its contexts by turns, so that each stands in one text. A near miss stands as it is and must come
out so. Addresses are made up under real domains, telephone numbers are of assigned ranges; keys are drawn for this set,
and a middle dot in each keeps scanners of sources from taking them for real ones.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    kind: str
    text: str
    masked: str | None  # the text with the placeholder; None for a near miss


PLACEHOLDERS = {"email": "<EMAIL>", "ip": "<IP_ADDRESS>", "phone": "<PHONE_NUMBER>", "secret": "<SECRET>"}

CONTEXTS = {
    "email": [
        "Write to {} before Friday.",
        "Contact: {}",
        "mailto:{}?subject=Hello",
        "<{}>",
        "({})",
        "# Author: Jane Roe <{}>, 2021",
        "email='{}'",
        '{{"email": "{}", "id": 3}}',
        "Jane,Roe,{},Boston",
        "Anfragen an {}, bitte.",
        "请联系{}。",
        "メール:{}まで",
        "{}: please unsubscribe",
        "Von: {}; An: Liste",
        "https://x.test/?to={}&x=1",
        "| {} | admin |",
        "the address is {}.",
        "{} wrote:\n> hello",
        "user: {}\npassword: none",
        "[Mail]({})",
    ],
    "ip": [
        "Connected to {} after 3 ms",
        "server {} is down",
        "ip={}",
        'host="{}"',
        "<td>{}</td>",
        "ssh root@{}",
        "the driver at {}.",
        "from {}: 64 bytes",
        "[{}] GET /index.html",
        "over {}, then dev",
        "Failed password for root from {} port 22",
        "allow {};",
        "src={} dst=10.0.0.1",
        "({})",
        "- {}",
        "{} - - [10/Oct/2023:13:55:36]",
        "if peer == '{}':",
        "ping {}",
        "A record: {}",
        "remote_addr: {}",
    ],
    "phone": [
        "Call {} today.",
        "Tel.: {}",
        "phone: {}",
        "Telefon {}, Mo-Fr",
        "You can reach us at {}.",
        "({})",
        "Fax {}",
        "ring {} or write",
        "T {}",
        '"phone": "{}"',
        "Mobile {}",
        "{} (office)",
        "WhatsApp: {}",
        "contact, {}, Boston",
        "Rufen Sie {} an",
    ],
    "secret": [
        "key = '{}'",
        "export TOKEN={}",
        '"value": "{}",',
        "Authorization: Bearer {}",
        "curl -H 'X-Key: {}' host",
        "{}",
        "# old key {}",
        'client = Client("{}")',
        "Use {} for the test server.",
        "secret: {}",
        "<key>{}</key>",
        "KEY={} python run.py",
    ],
}

VALUES = {
    "email": """
jane.roe@gmail.com|JANE.ROE@GMAIL.COM|jane@gmail.COM|Jane.Roe@Outlook.Com|jane@acme.store|anna@klinik.health|red@news.media|
max@museum.berlin|tom@agency.london|info@sparkasse.bank|eve@friends.social|li@shop.xn--p1ai|jane@x.com|bo@q.org|ann@t.co|
jörg@web.de|info@münchen.de|почта@пример.рф|user@xn--mnchen-3ya.de|o'brien@company.ie|first.last+tag@sub.domain.co.uk|
a_b-c%d@long-name.museum|x1@company.com|1234567@qq.com|jane_roe99@yahoo.co.jp|hr@firm.photography|n.n@uni-goettingen.de|
sales@my-shop.online|me@home.arpa.net|root@server.hetzner.cloud|dev@project.dev|a.very.long.local.part.of.an.address@corp.io|
kim@naver.kr|li.wei@163.com|marie@orange.fr|paolo@libero.it|jose@terra.com.br|anders@telia.se|ivan@yandex.ru|yuki@docomo.ne.jp|
sam@startup.ai|pat@games.gg|lee@design.studio|ola@skole.no|p@politie.nl|team@open.foundation|k.w@firm.gmbh|z@zeitung.wien|
office@praxis.koeln|e-mail@kanzlei.hamburg|mia@hotel.paris|joe@farm.organic|abc@law.legal|ned@car.auto|x.y@wine.vin|
kate@yoga.fitness|liz@pub.beer|ian@golf.golf|sue@dance.dance|roy@pics.photo|amy@blog.blog|dan@labs.technology|
jane%40gmail.com|jane&#64;gmail.com|q.r@company.email|hello@world.today|me@mine.name|c@club.club|d.e@data.science|
postmaster@mail.gov.uk|u@university.ac.za|info@gov.pl|bob@sub.sub2.sub3.example-corp.com|_svc@company.net|b.b@b-b.org|
jane@company.info""",
    "ip": """
93.184.216.34|87.123.45.67|203.12.113.9|45.33.32.156|104.16.132.229|151.101.1.69|185.199.108.153|52.95.110.1|13.107.42.14|
216.58.214.14|172.217.16.142|198.41.0.4|199.7.91.13|192.203.230.10|192.5.5.241|193.0.14.129|202.12.27.33|91.198.174.192|
80.81.82.83|62.210.16.6|5.9.164.112|3.120.55.81|34.117.59.81|35.190.247.13|18.66.27.99|23.45.67.89|31.13.72.36|
46.101.200.12|64.233.160.5|66.249.66.1|69.63.176.13|72.14.207.99|74.125.224.72|77.88.55.60|78.46.89.147|81.2.69.142|
95.216.24.32|98.137.11.163|103.235.46.40|106.11.84.3|110.242.68.66|114.114.114.114|120.232.145.144|139.130.4.5|
141.1.1.1|149.112.112.112|162.158.0.77|176.9.93.198|188.114.96.7|195.46.39.39|208.67.222.222|217.160.0.201|223.5.5.5|
1.116.45.203|2.56.57.138|93.184.216.34/24|http://93.184.216.34/|93.184.216.34:8080|
2001:4860:4860::8888|2606:4700:4700::1111|2a00:1450:4001:82a::200e|2a02:8109:9a80:1c5c:e0f2:44b:8d3a:1|
2620:fe::fe:9|2a03:2880:f12f:83:face:b00c:0:25de|2001:67c:2e8:22::c100:68b|2400:cb00:2048:1::c629:d7a2|
2A01:4F8:C0C:9D3A::2|2607:f8b0:4005:805::200e|2c0f:fb50:4003::1|2804:14c:5b80:8000::a1|[2a00:1450:4001:82a::200e]|
[2606:4700::6810:84e5]:443|2001:4860:4860::8844/64|::ffff:93.184.216.34""",
    "phone": """
+49 30 901820 44|+49 (0)89 12345678|+4915112345678|+49-40-428280|+49.221.9130|0049 30 90182044|+1-415-867-5309|
+1 (415) 867-5309|
+14158675309|+1.212.736.5000|(415) 867-5309|415-867-5309|415.867.5309|(212)736-5000|1-800-356-9377|1 (800) 356-9377|
+44 (0) 20 7946 1234|+44 20 7031 3000|+442070313000|+44 7911 123456|0044 20 7031 3000|+33 1 42 68 53 00|+33142685300|
+33 (0)1 42 68 53 00|+39 06 6982|+39 02 7233 4455|+34 91 123 45 67|+34 612 345 678|+31 20 551 2000|+32 2 501 02 11|
+41 44 668 18 00|+43 1 711 00|+46 8 508 29 000|+47 22 05 10 00|+45 33 92 33 33|+358 9 310 1691|+48 22 694 00 00|
+420 224 861 111|+36 1 266 2622|+30 21 0331 0392|+7 495 697 03 49|+7 (495) 697-03-49|+380 44 255 7333|+90 312 415 29 29|
+972 2-670-5555|+971 4 390 0000|+91 11 2301 5321|+91 98765 43210|+86 10 6601 1122|+86 138 0013 8000|+81 3-3580-3311|
+81 90-1234-5678|+82 2-730-5800|+82 10-2345-6789|+61 2 6277 7111|+61 412 345 678|+64 4 817 9699|+55 11 3113-9000|
+55 (11) 98765-4321|+52 55 5658 1111|+54 11 4344 3600|+56 2 2690 4000|+27 12 300 5200|+234 9 461 2000|+20 2 2792 1000|
+254 20 222 7411|+65 6335 3333|+60 3 8872 6000|+66 2 356 9500|+62 21 384 0403|+84 24 3845 5000|+63 2 8736 2000|
+353 1 702 6000|+351 21 391 6000|+40 21 314 3400""",
    "secret": """
AKIA·Q7ZX2MB4KT9WLD5C|ASIA·Y34FZKBOKMUTVV7A|ghp_·f3Kq9ZtW1xYb7LmN2cVd8RsT4uPo6EgH0iJa|gho_·16C7e42F292c6912E7710c838347Ae178B4a|
ghs_·Xk29dLs0QmPz81VbNc73TyRw45EaUf6HjGiK|ghr_·1B4a2e77838347a7E420ce178F2E7c6912E1692826|
github_pat_·11ABCDEFG0aQ8sKz3xYw2Vu_4tSrPqOnMlKjIhGfEdCbA9z8y7x6w5v4u3t2s1r0Q|glpat-·x9Kz2Lm4Qp7Rt1Vw8Yb3|gldt-·Zq3Wn8Rk5Tx1Yv7Lp2Mb|
glsa_·k8Jm2Nq4Pr6St8Uv0Wx2Yz4Ab6Cd8Ef0_a1b2c3d4|xoxb-·281736450912-4958172634051-Qw9sLk3Vb7Nm2Pd5Rt6YxZ81|
xoxp-·918273645012-564738291056-102938475610-af82bc91de73f04a5c6b7d8e9f012345|xapp-·1-A02KQ7WLM8P-3141592653589-9f8e7d6c5b4a39281706f5e4d3c2b1a0|
https://hooks.slack.·com/services/T02KQ7WLM/B03PZ8XNV/k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3E|hf_·QkLmZxWvTpRsYbNcDfGhJkMnPqRtVwXyZa|
AIza·SyB7k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7J8|GOCSPX-·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh|ya29.·a0AfH6SMBx7k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5G|
sk_live_·4eC39HqLyjWDarjtT1zdp7dc|rk_live_·51HxQk2LmNpRsTvWxYz03Ab4|sk_test_·26PHem9AhJZvU623DfE1x4sd|whsec_·9Kx2Lm4Qp7Rt1Vw8Yb3Zc5Nd6Fg0Hj2K|
sk-·T9xLm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9Mn1Pq3Rs5Tu7Vw9|sk-proj-·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9_Mn1Pq3Rs5Tu7|
sk-ant-·api03-k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9Mn1Pq3Rs|gsk_·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9Mn1Pq3Rs5Tu7Vw9Xy1Za3B|
r8_·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9Mn1Pq|pplx-·9f86d081884c7d659a2feaa0c55ad0159f86d081884c7d65|npm_·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9Mn1P|
pypi-·AgEIcHlwaS5vcmcCJDk5Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9Mn1Pq3Rs5Tu7Vw9Xy1Za3B|rubygems_·9f86d081884c7d659a2feaa0c55ad0159f86d081884c7d65|
dckr_pat_·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5G|SG.·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd.3Ef5Gh7Jk9Mn1Pq3Rs5Tu7Vw9Xy1Za3Bc5De7Fg9HiJ|SK·9f86d081884c7d659a2feaa0c55ad015|
key-·3ax6xnjp29jd6fds4gc373sgvjxteol0|key-·9f86d081884c7d659a2feaa0c55ad015|9f86d081884c7d659a2feaa0c55ad015-us·12|
5812736450:AA·HdqTcvCH1vGWJxfSeofSAs0K5PALDsaw9|MTk4NjIy·NDgzNDcxOTI1MjQ4.Cl2FMQ.ZnCjm1XVW7vRze4b7Cq4se7kKWs|
dop_v1_·9f86d081884c7d659a2feaa0c55ad0159f86d081884c7d659a2feaa0c55ad015|dapi·9f86d081884c7d659a2feaa0c55ad015|
hvs.·CAESIJlm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9|shpat_·9f86d081884c7d659a2feaa0c55ad015|sq0atp-·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd|
lin_api_·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9Mn1Pq3Rs|secret_·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9Mn1Pq3Rs5Tu|NRAK-·QZX2MB4KT9WLD5C7HJ3NP8RS6VY|
AGE-SECRET-KEY-·1QZX2MB4KT9WLD5C7HJ3NP8RS6VYQZX2MB4KT9WLD5C7HJ3NP8RS6VYQZX2|sbp_·9f86d081884c7d659a2feaa0c55ad0159f86d081|
PMAK-·9f86d081884c7d659a2feaa0-9f86d081884c7d659a2feaa0c55ad01512|figd_·k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3Ef5Gh7Jk9Mn1Pq3Rs5T|
eyJ·hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U""",
}
# Values that only their name gives away, and keys of several lines: text with the value between ⟦ and ⟧.
MARKED = {
    "secret": """
api_key = "⟦9f86d081884c7d659a2feaa0c55ad015⟧"
API_KEY=⟦Zx81Qw9sLk3Vb7Nm2Pd5Rt6Y⟧
aws_secret_access_key = ⟦wJalrXUtnFEMI/K7MDENG/bPxRfiCYzQ9mT4Lk2v⟧
"client_secret": "⟦k9Lm2Qp4Rt6Vw8Yb0Zc1Xd3E⟧"
password: ⟦Tr0ub4dor3xK9mQ2pL7vZ8w⟧
auth_token => '⟦af82bc91de73f04a5c6b7d8e9f012345⟧'
const SECRET = `⟦Hq7Lw2Zx9Kp4Vm1Rt8Yb3Nc6⟧`;
accessToken: '⟦2YotnFZFEjr1zCsicMWpAAx9Qk7⟧'
private-key := "⟦qZ8xW2cV5bN1mL4kJ7hG9fD3⟧"
Authorization: Basic ⟦dXNlcm5hbWU6cGFzc3dvcmQxMjM0NTY3OA==⟧
Authorization: token ⟦af82bc91de73f04a5c6b7d8e9f01234567890abc⟧
<add key="x" token="⟦x7k2m9q4w1z8v5b3n6c0l2p4⟧" />
session_token=⟦FwoGZXIvYXdzEBYaDKq9Lm2Qp4Rt6Vw8Yb0Zc1Xd⟧
encryption_key: ⟦3c6e0b8a9c15224a8228b9a98ca1531d⟧
https://deploy:⟦k9Lm2Qp4Rt⟧@registry.company.com/v2
postgres://app:⟦s3cr3tPassw0rd⟧@10.0.0.5:5432/db
curl -d 'refresh_token=⟦1B4a2e77838347a7E420ce178F2E7c69⟧&x=1'
""",
    "phone": """
Tel.: ⟦030 90182044⟧
Tel: ⟦020 7031 3000⟧
Tél. : ⟦01 42 68 53 00⟧
Telefon: ⟦089/12345678⟧
phone: ⟦415 867 5309⟧
电话：⟦010-66011122⟧
联系电话：⟦021-61234567⟧
手机：⟦13800138000⟧
電話 ⟦03-3580-3311⟧
tel:⟦+14158675309⟧
Handy: ⟦0151 12345678⟧
Teléfono: ⟦91 123 45 67⟧
Telefono ⟦06 6982 1234⟧
тел. ⟦8 (495) 697-03-49⟧
Fax no. ⟦0221 9130123⟧
Call ⟦020 7031 3000⟧ for a table.
ruf ⟦0151 12345678⟧ an
appelez le ⟦01 42 68 53 00⟧.
(⟦03-3580-3311⟧)
Sydney ⟦02 6277 7111⟧, office
Büro ⟦(030) 901820-44⟧
☎ ⟦044 668 18 00⟧
""",
}
# A line each.
NEAR_MISSES = {
    "email": r"""
@pytest.fixture def f(): ...
    @property.setter
y = x@w.weight
z = a@b.T + a@b.conj()
out = q@self.k.transpose(0, 1)
scores = q@k.mT / math.sqrt(d)
h = x@W.data
h = x@w.map
r = v@M.dot(x)
k = a@b.id
z = u@v.name
loss = hidden@proj.weight
grad = delta@layer.weight.T
attn = query@key.transpose(-2, -1)
git clone git@github.com:org/repo.git
git@gitlab.com:group/project.git
git@bitbucket.org:team/repo.git
npm i lodash@4.17.21
npm install react@18.2.0 react-dom@18.2.0
yarn add @babel/core@7.22.5
pnpm add typescript@next
user@example.com and a@b.example.org
admin@example.net
noreply@mail.example.edu
me@localhost
root@host.local
celery@%h
name@host
user@machine
postgresql://scott:tiger@localhost:5432/db
amqp://guest:guest@rabbitmq:5672//
chacha20-poly1305@openssh.com
curve25519-sha256@libssh.org
hmac-sha2-256-etm@openssh.com
i@i.de
@name.com
a @ b.com
jane at gmail dot com
twitter.com/@jane.roe
Follow @jane_roe on Mastodon
@media screen and (max-width: 600px)
@import url('style.css');
@font-face { font-family: X; }
icon@2x.png
logo@3x.jpg
background@2x.webp
uses: actions/checkout@v4
uses: actions/setup-python@v5.1.0
image: nginx@sha256:9f86d081884c7d65
FROM python@3.11.4
brew install node@18
python@3.11
go get golang.org/x/tools@latest
pip install pkg@file.whl
someone@invalid
a@b.test
x@y.invalid
tom@server.localhost
jane@
@gmail.com
jane@gmail
jane@@gmail
jane@-.-
user@10.0.0.1
C@t 5 e cable
50@2.5 each
apples @ $1.20
5@10.25
size: 3@4.50
$x@array.length
foreach item@list.items
def __matmul__(self): return a@b.c
x@y.z
doc@section.subsection
@app.route("/mail")
@dataclass.field
@typing.overload
@org.junit.Test
@com.fasterxml.jackson.annotation.JsonProperty
\@ifpackageloaded.sty
\makeatletter\@input.tex
person@placeholder.example""",
    "ip": r"""
127.0.0.1
0.0.0.0
10.1.2.3
172.16.9.8
192.168.1.44
169.254.3.2
255.255.255.0
255.255.255.255
100.64.0.1
192.0.2.7 198.51.100.23
203.0.113.99
198.18.0.5
224.0.0.251
239.255.255.250
240.0.0.1
version 10.2.13.45
Version: 12.3.44.5
v12.3.44.5
ver. 80.2.13.45
rev 12.33.44.55
revision 64.12.0.88
release 120.4.33.1
build 99.1.2.3
firmware 45.20.33.8
"version": "90.2.13.45"
AssemblyVersion("40.20.33.99")
FileVersion=63.1.2.3
torch==12.11.33.4
>= 20.1.30.4
<= 50.1.30.4
~= 33.1.30.4
!= 44.1.30.4
^80.1.2.3
1.2.3.4
8.8.8.8
1.3.6.1.4.1.311
1.3.6.1
2.5.29.15
2.16.840.1
0.9.2342.19200300
12.34.56.789
12.34.56.7-beta
34.0.0.0/8
93.184.216.0/24
185.199.108.0/22
a12.34.56.78
12.34.56
12.34.56.78.90
256.300.1.2
999.999.999.999
Chrome/90.0.44.30
nginx/80.1.2.3
Mozilla/5.0 Version/63.0.3.71
libfoo.so.33.4.5.6
package-45.6.7.8
Section 44.2.1.3
see section 51.3.2.1
§ 12.3.1.4
Figure 40.1.2.3
clause 45.2.3.1
4.3.12.1 Initialisation
3.12.4.15 Remarks
12:34:56
::1
::
fe80::1
fe80::1ff:fe23:4567:890a
ff02::1
2001:db8::8a2e:370:7334
2001:db8:85a3::8a2e:370:7334
fd00::1:2:3:4
fc00::1
std::abc::def
x[2000::3]
a[3000:4000:2]
2021:10:12:11
2021:10:12:11:30:00
00:1B:44:11:3A:B7
dead:beef
face::b00c
2a02:8109::/32
2001:67c::/32
oid 80.1.2.3""",
    "phone": r"""
123-456-7890
212-555-0123
(800) 555-0199
+1 212 555 0147
2020-01-02
2020-01-02 12:30:45
10.1103/PhysRevLett.116.061102
doi:10.1000/182.415.867
1e+10 -3
a + 12 34 56
978-3-16-148410-0
ISBN 0-306-40615-2
ISSN 1234-5679
@@ -12,34 +12,36 @@
@@ -415,867 +415,867 @@
UTC+05 30
+05:30
+0100
x[234-567-8901:]/2-1
3.14159-2653-589
0x415-867-5309
192-168-1-1
415-867-530
222 333 4444
1 234 567 890
1,234,567,890
1234567890
4158675309
00000000-0000-0000-0000-000000000000
550e8400-e29b-41d4-a716-446655440000
4111 1111 1111 1111
4111-1111-1111-1111
123-45-6789
SSN 078-05-1120
DE89 3704 0044 0532 0130 00
GB82 WEST 1234 5698 7654 32
2001-2010-2020
1939-1945
pages 415-867
pp. 212-736
lines 415-867-5309-1
+1
+12 +34 +56
+1.5 -2.25 +3.75
x = +12345
+1234567
score +15 000
+100 000 000 000 000 000
10+20+30
1+2-3+4-5+6
a[1]+2222-3333
002-001-003
0012 0034 0056
01 02 03 04
01 02 03 04 05 06 07 08
dump: 09 0a 0b 01 02 03 04 05 0c
02-01-2003 10:20
01-02-2020
0123 4567
05 06 2020
0306406152
0.123 456 789
0x01 02 03
00:49:30:90
0049
007 James Bond
RFC 2616
port 8080-9090
model 8210-1234
phone model X100
phone 5
telephone, 1876
Tel Aviv 2010
tel 12
fax machine from 1999
mobile first
version 4.15.867
4.15.867.5309
tag v2.12.736.5000
1600x1200-1024x768
36.12.45-67.89
SKU 415-8675-309
part no. 212-7365-000
000-000-0000
111-111-1111
999-999-9999
555-555-5555
(123) 456-7890
+999 123 456 789
+0 123 456 789
20230415-867-5309""",
    "secret": r"""
token = 'some_identifier_with_many_words'
password = 'hunter2'
password = "correct horse battery staple"
AKIAIOSFODNN7EXAMPLE
wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY
secret_key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
hf_token
AKIAXXXXXXXXXXXXXXXX
secret: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'
token='<SECRET>'
token = get_token(request)
token = os.environ["TOKEN"]
token = self.tokenizer.next_token()
token: ${{ secrets.GITHUB_TOKEN }}
password = getpass.getpass()
password: !vault
password_hash = hash_password(password)
sha256 9f86d081884c7d659a2feaa0c55ad015
md5: 9f86d081884c7d659a2feaa0c55ad015
commit 9f86d081884c7d659a2feaa0c55ad0159f86d081
sha256:9f86d081884c7d659a2feaa0c55ad0159f86d081884c7d659a2feaa0c55ad015
integrity="sha384-oqVuAfXRKap7fdgcCY5uykM6+R9GqQ8K"
etag: "33a64df551425fcc55e4d42a148795d9f25f89d4"
550e8400-e29b-41d4-a716-446655440000
api_key='your-api-key-goes-right-here'
api_key = "YOUR_API_KEY_HERE_PLEASE_REPLACE"
API_KEY=<your key>
api_key: str | None = None
-----BEGIN PUBLIC KEY-----
-----BEGIN CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
marker = "-----BEGIN PRIVATE KEY-----"; end = "-----END PRIVATE KEY-----"
ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQC7vbqajDw4
data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAUA
eyJhbGciOiJIUzI1NiJ9
eyJ is how a JSON Web Token begins
sk-learn
sk-toggleable__label-arrow
sk-estimator-doc-link-container-wrapper
sk_live_ is the prefix
xoxb- tokens are for bots
ghp_ is GitHub's prefix
AIza begins a key of Google's
pypi-attestations
npm_config_registry
npm_lifecycle_event
glpat-
SG.com
SKU9f86d081
key-value-store-with-a-long-name-for-the-test
key-signature-of-the-piece-in-f-sharp-minor
secret_santa_organizer_for_the_office_party
token_type_ids = encoded["token_type_ids"]
tokens = tokenizer.tokenize(sentence)
secret = "shh"
private_key = load_pem_private_key(data)
access_key = keyboard.Key.alt
session_token = request.session.token
token = 'abcdefghijklmnopqrstuvwxyz'
token_endpoint = "https://login.microsoftonline.com/common"
password = "aaaaaaaaaaaaaaaaaaaaaaaa"
secret_name = projects/my-project/secrets/my-secret-name
Authorization: Bearer <token>
Authorization: Bearer $TOKEN
Authorization: Basic user:password
https://user:password@host.com/
postgresql://scott:tiger@localhost:5432/db
https://user:${PASSWORD1}@host.com/
http://[::1]:8080/@1234567/
M.A.B.C
NODE.JS.IS.GREAT
do_v1_
shpat_
dapibus diam vel quam dapibus dapibus lectus
hvs.Client()
1234567890:AAAA
12345678:Answer
aspect ratio 123456789:AA
whsec_
r8_
figd_plugin
lin_api_
SECRET_KEY_BASE
PASSWORD_RESET_TIMEOUT_DAYS = 3""",
}


def cases() -> list[Case]:
    found = []
    for kind, contexts in CONTEXTS.items():
        for number, value in enumerate(VALUES[kind].replace("\n", "").split("|")):
            context, value = contexts[number % len(contexts)], value.replace("·", "")
            # What stands around an address is not of it.
            left, right = value, PLACEHOLDERS[kind]
            for opening, closing in (
                ("http://", "/"),
                ("", "/24"),
                ("", "/64"),
                ("", ":8080"),
                ("[", "]"),
                ("[", "]:443"),
                ("::ffff:", ""),
            ):
                if kind == "ip" and (opening or closing) and left.startswith(opening) and left.endswith(closing):
                    right = opening + right + closing
                    break
            found.append(Case(kind, context.format(left), context.format(right)))
        for line in MARKED.get(kind, "").strip().splitlines():
            before, rest = line.split("⟦")
            value, after = rest.split("⟧")
            found.append(Case(kind, before + value + after, before + PLACEHOLDERS[kind] + after))
        found += [Case(kind, line, None) for line in NEAR_MISSES[kind].strip("\n").splitlines()]
    return found
