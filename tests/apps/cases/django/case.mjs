// The login form of Django's admin, which Django guards by the page's origin.
import { freePort, venv } from '../../place.mjs';

export const title = 'Django 5.2: admin login';
export const recipes = [
  { rule: 'upstream', how: '`CSRF_TRUSTED_ORIGINS`', trusted: true },
  { rule: 'upstream', how: '`--origin upstream`', flags: ['--origin', 'upstream'] },
  { rule: 'preserve', how: '`ALLOWED_HOSTS`, `CSRF_TRUSTED_ORIGINS`', trusted: true, allowed: true },
];

export async function run(place) {
  const port = await freePort();
  const env = {
    DATABASE: `${place.folder}/db.sqlite3`,
    ALLOWED: place.recipe.allowed ? place.host : '',
    TRUSTED: place.recipe.trusted ? place.url : '',
    DJANGO_SUPERUSER_USERNAME: 'ada',
    DJANGO_SUPERUSER_PASSWORD: 'a-word-for-ada',
    DJANGO_SUPERUSER_EMAIL: 'ada@example.test',
  };
  const manage = (...args) => [`${place.source}/manage.py`, ...args];
  await place.run(venv('python'), manage('migrate', '--verbosity', '0'), { env });
  await place.run(venv('python'), manage('createsuperuser', '--noinput'), { env });
  await place.app(port, venv('python'), manage('runserver', '--noreload', String(port)), { env });
  await place.tunnel(String(port));

  const page = await place.page();
  await page.goto(`${place.url}/admin/`);
  await page.getByLabel('Username').fill('ada');
  await page.getByLabel('Password').fill('a-word-for-ada');
  await page.getByRole('button', { name: 'Log in' }).click();
  await page.getByText('Site administration').first().waitFor();
  if (page.url() !== `${place.url}/admin/`) throw new Error(`the login led to ${page.url()}`);
}
